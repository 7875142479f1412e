"""Generate the sample data set: small synthetic stand-ins for the course's data files.

    python data/make_sample.py [--out DIR] [--seed N]

All sentences are filled in from the templates and word tables below. The same seed gives the same
bytes on any machine. A name with a leading ``*`` is held out: it occurs in the dev and test files,
but never in the training files.

SST (classes 0 to 4) and CFIMDB (0 or 1). A template serves both polarities. ``{S}``, ``{M}``,
``{V}`` and ``{N}`` (strong adjective, mild adjective, verb, noun) are words of the label's
polarity, ``{XS}``, ``{XM}``, ``{XV}`` and ``{XN}`` words of the opposite one. STRONG templates
give class 4 or 0, MILD ones 3 or 1, NEUTRAL ones 2. Most of these sentences have words of both
polarities, so that negation, contrast, concession and comparison decide. The SHORT templates
("A dull film.") teach SST what the words mean by themselves. A CFIMDB review mixes opinions of
both polarities, most of them of its label's, and ends with a verdict that agrees with the label.

Quora. A question asks for something (how, how long, ...) about an action on a thing. Two questions
are duplicates if all three parts are the same, however they are worded. The other pairs differ in
one part, in two parts or in all of them.

STS (0 to 5). A sentence describes a scene: agent, action, object and setting. A part scores 1 if
both sentences name the same concept (synonyms are the same concept), PARTIAL if the two concepts
are related, and 0 otherwise. The similarity is 5 times the mean of the parts, weighted by WEIGHTS,
plus a little noise, rounded to one decimal.

NLI. Each row has a scene, an entailed sentence and a contradicting one. The entailed sentence is
the same scene in other words, often with a more general agent or object. The contradicting one
has the same agent do something else.
"""

import argparse
import csv
import os
import re
from pathlib import Path
from random import Random

SIZES = {"train": 1500, "dev": 300, "test-student": 200}
NLI_SIZE = 1500
SST_NOISE = 0.06  # fraction of SST labels that are moved to a neighbouring class
CFIMDB_NOISE = 0.03  # fraction of CFIMDB labels that are flipped
AGREE = 0.65  # probability that an opinion before the verdict has the polarity of the review
QUORA_NOISE = 0.02  # fraction of Quora labels that are flipped
# Parts in which the second question differs from the first -> weight.
QUORA_KINDS = {"": 42, "thing": 12, "action": 6, "intent": 4, "action thing": 20, "domain": 16}
QUORA_REWORDING = {True: 0.65, False: 0.3}  # duplicate -> probability of rewording a shared part
NO_SETTING = 0.25  # fraction of STS scenes with an adverb in place of a setting
UNRELATED = 0.2  # fraction of STS pairs from two domains
KEEP_RATES = [0.0, 0.2, 0.5, 0.5, 0.7, 1.0]  # probability that the second scene keeps a part
STS_REWORDING = {True: 0.8, False: 0.3}  # similarity > 3 -> probability of rewording a shared part
STS_NOISE = [-0.4, -0.2, -0.2, 0.0, 0.0, 0.0, 0.2, 0.2, 0.4]

# ---- Sentiment -------------------------------------------------------------------------------

POLAR_WORDS = {
    "S": {
        1: "superb|excellent|terrific|wonderful|brilliant|outstanding|fantastic|"
        "*magnificent|*marvelous|*splendid|*sublime|*exquisite|*first-rate",
        -1: "awful|terrible|dreadful|horrible|appalling|painful|hopeless|"
        "*atrocious|*abysmal|*ghastly|*lousy|*unbearable|*wretched",
    },
    "M": {
        1: "good|decent|solid|engaging|enjoyable|effective|charming|lively|"
        "*pleasing|*appealing|*satisfying|*likable|*clever|*entertaining",
        -1: "dull|flat|weak|bland|clumsy|tedious|forgettable|boring|"
        "*stale|*lackluster|*tiresome|*insipid|*dreary|*feeble",
    },
    "V": {
        1: "impressed me|moved me|held my attention|won me over|thrilled me|"
        "*charmed me|*delighted me|*swept me away",
        -1: "bored me|annoyed me|tested my patience|let me down|depressed me|"
        "*irritated me|*exasperated me|*left me cold",
    },
    "N": {
        1: "a triumph|a joy|a treat|a gem|*a delight|*a masterpiece|*a winner",
        -1: "a mess|a chore|a failure|a bore|*a disaster|*a dud|*a flop",
    },
}
ASPECTS = (
    "script|acting|direction|dialogue|story|music|camerawork|ending|lead performance|romance|"
    "final act|opening|humor|plot|supporting cast|middle section"
)
UNCOUNTED = "acting|direction|dialogue|music|camerawork|humor"
FILMS = (
    "thriller|drama|comedy|western|mystery|sequel|heist film|road movie|horror film|"
    "love story|war film|musical|spy film|family film|ghost story|courtroom drama"
)
INTENSIFIERS = "absolutely|truly|simply|*utterly"
HEDGES = "rather|fairly|mostly|*pretty"
PERSONS = (
    "a retired boxer|a young nurse|a small-town sheriff|a lonely pianist|a failed inventor|"
    "a stubborn farmer|a tired detective|a traveling salesman|a shy librarian|a ferry captain|"
    "a divorced judge|a street magician|a night watchman|a former spy|a village priest"
)
PLOTS = (
    "finds a suitcase full of money|has to sell the family farm|moves in with an old rival|"
    "is sent to guard a lighthouse|gets lost in the desert|takes in an orphan|"
    "witnesses a robbery|returns home after twenty years|falls for a neighbor|"
    "inherits a haunted hotel|drives a bus across the country|loses a bet with a banker|"
    "searches for a missing brother|opens a bakery by the sea"
)
SLOTS = {"I": INTENSIFIERS, "H": HEDGES, "U": UNCOUNTED, "P": PERSONS, "L": PLOTS}

STRONG = [
    "the {A} is {I} {S}, and so is the {B}",
    "{XS} is the very last word I would choose for this {F}",
    "the {A} is as far from {XS} as a {F} can get",
    "to call the {A} {XS} is the exact opposite of the truth",
    "no one in their right mind would call this {F} {XS}",
    "this {F} is {N}, and the {A} alone is {I} {S}",
    "I expected {XN}, but this {F} is {I} {S}",
    "whoever called this {F} {XS} was not watching, because it is {N}",
    "forget the {XS} reviews, because this {F} is {N}",
    "the trailer looked {XS}, yet the {F} itself is {I} {S}",
    "the {A} {V} from the first scene to the last, without a single {XM} moment",
    "you will not find a single {XM} scene in this {S} {F}",
    "last year's {XS} {F} has nothing in common with this one, which is {I} {S}",
    "nobody who sat through this {F} could call it anything but {S}",
    "it could have been {XN}; instead it is {I} {S}",
    "I take back every {XS} thing I ever said about the director, for this {F} is {N}",
    "even people who found the first part {XS} agree that this {F} is {I} {S}",
    "other films of this kind are {XS}, but here the {A} {V} and the {B} is {S}",
    "I have not seen a {F} this {S} in years",
    "I looked for a {XM} moment in this {F} from start to finish, and there is none",
    "no other {F} this year has had {U} as {S} as this",
    "there is nothing {XM} about this {F}, and the {A} in particular is {S}",
    "what {N} this {F} is, for all the talk about its {XM} {A}",
]
MILD = [
    "the {A} is {H} {M}",
    "the {F} is anything but {XM}",
    "I would not call the {A} {XM}",
    "the {A} is hardly {XS}",
    "nobody could say that the {A} is {XM}",
    "far from being {XN}, the {F} is {H} {M}",
    "I expected {XN}, but the {F} is {H} {M}",
    "the {A} is not {S}, but it is {H} {M}",
    "although the {A} is {XS}, the {F} as a whole is {H} {M}",
    "the {A} {XV} at first, but in the end the {F} {V}",
    "the {F} is {H} {M}, even if the {A} is {XS}",
    "it starts out {XS} and ends up {H} {M}",
    "the {F} is less {XM} than the poster suggests",
    "my friends found the {A} {XS}; I did not",
    "the first film was {XS}; this {F} is not",
    "whatever they say about the {A}, it never once {XV}",
    "after a {XS} first hour, the {F} turns {H} {M}",
    "the {A} is more {M} than {XM}",
    "the {A} comes close to {S}, but the rest is merely {M}",
    "it is not {N}, but the {A} is {H} {M}",
    "for a {F} with such {XS} {U}, it is {H} {M}",
    "despite the {XS} {A}, the {F} {V} a little",
    "the {A} {V} a little, despite the {XS} {B}",
    "people keep telling me how {XS} the {A} is, and I do not see it",
    "I had been told that the {F} was {XN}, and it is no such thing",
    "the {A} {XV}, but the {B} is {H} {M}, and that matters more",
]
NEUTRAL = [
    "the {A} is {M} and the {B} is {XM}, so it more or less evens out",
    "half of the {F} is {S}, the other half is {XS}",
    "for every {M} scene in this {F}, there is a {XM} one",
    "some viewers will find the {A} {S}, others will find it {XS}",
    "the {A} is neither {S} nor {XS}",
    "I still cannot decide whether the {A} is {M} or {XM}",
    "the {A} {V}, the {B} {XV}, and I have no opinion either way",
    "the {F} will be {N} for some people and {XN} for others",
    "opinions on the {A} range from {S} to {XS}",
    "parts of it {V} and parts of it {XV}, in equal measure",
    "the {F} follows {P} who {L}",
    "this {F} tells the story of {P} who {L}",
]
# Only for SST. "Fine" is in no table on purpose: "A fine film." is an example in the README.
SHORT_STRONG = [
    "{S}",
    "{N}",
    "a {S} {F}",
    "a {S} movie",
    "this is a {S} {F}",
    "this film is {S}",
    "the {A} is {S}",
    "what a {S} {F}",
]
SHORT_MILD = [
    "{M}",
    "not {XM}",
    "a {M} {F}",
    "a {M} film",
    "this is a {M} {F}",
    "this movie is {M}",
    "the {A} is {M}",
    "this {F} {V}",
]
OPENINGS = [
    "I saw this {F} on a rainy Sunday with my sister",
    "my neighbor lent me this {F} last week",
    "we picked this {F} because everything else was sold out",
    "this {F} has been on my list since the spring",
    "a colleague talked me into watching this {F} on Friday",
    "our film club showed this {F} on Tuesday night",
    "I caught this {F} late at night after work",
    "my parents insisted that I watch this {F}",
    "this {F} was shown on the plane to Boston",
    "I rented this {F} for a quiet evening with friends",
]
PLOT_LINES = [
    "it is about {P} who {L}",
    "it follows {P} who {L}",
    "in it, {P} {L}",
]
SAME_POLARITY = ["", "", "also, ", "besides, "]
OTHER_POLARITY = ["on the other hand, ", "then again, ", "still, "]
VERDICT_LEADS = ["all in all, ", "in the end, ", "to sum up, ", "so my verdict is simple: "]

# ---- Questions: ";" separates concepts, "|" the names of one concept ---------------------------

INTENTS = {
    "how": "how does one {}|how would you {}|what is a sensible way to {}|what does it take to {}|"
    "*can you tell me how to {}|*how would you advise me to {}|*which steps do I take to {}",
    "time": "how long will it take me to {}|how much time do I have to allow to {}|"
    "what amount of time will I need to {}|*how much time should I set aside to {}|"
    "*how many hours does it usually take to {}",
    "cost": "how expensive is it to {}|what will I have to pay to {}|"
    "how much money will I need to {}|*what is a realistic budget to {}|"
    "*how much should I expect to spend to {}",
    "worth": "does it make sense for me to {}|would it be a good idea to {}|"
    "*would it be wise to {}|*would you recommend that I {}",
    "hard": "why is it such hard work to {}|what makes it so difficult to {}|"
    "why do I have such trouble when I try to {}|*why do I find it so tough to {}|"
    "*why do I struggle to {}",
    "help": "who could help me {}|where can I find someone to help me {}|"
    "*whom should I ask to help me {}|*is there anybody who could help me {}",
    "mistakes": "what mistakes should I avoid when I {}|what can go wrong when I {}|"
    "*what should I watch out for when I {}|*which errors are common when you {}",
}
QUESTION_DOMAINS = [
    {
        "intents": "how time cost hard help",
        "actions": "clean {}|wash {}|*get the dirt out of {}; repair {}|fix {}|*mend {};"
        "throw out {}|get rid of {}|*dispose of {}; move {} upstairs|carry {} up the stairs",
        "things": "a sofa|a couch|*a settee; a rug|a carpet; a refrigerator|a fridge;"
        "a closet|a wardrobe; a trash can|a garbage bin; a stove|a cooker; *a chest of drawers|"
        "*a dresser; a vacuum cleaner|a hoover",
    },
    {
        "intents": "how cost worth mistakes help",
        "actions": "buy {}|purchase {}|*get hold of {}; sell {}|find a buyer for {};"
        "rent {}|hire {}; insure {}|get insurance for {}|*take out a policy on {}",
        "things": "a car|an automobile; a bicycle|a bike; a laptop|a notebook computer;"
        "an apartment|a flat|*a condo; a truck|a lorry; a motorcycle|a motorbike;"
        "a camper|a motor home|*an RV; *a sailing boat|*a yacht",
    },
    {
        "intents": "how time mistakes help",
        "actions": "cook {}|prepare {}|*make a meal with {}; thaw {}|defrost {}|*unfreeze {};"
        "freeze {}|put {} in the freezer; season {}|add flavor to {}|*spice up {}",
        "things": "eggplants|aubergines; zucchini|courgettes; shrimp|prawns; ground beef|"
        "minced beef|*mince; chickpeas|garbanzo beans; scallions|spring onions|*green onions;"
        "corn|maize; beets|beetroot; *bell peppers|*capsicums",
    },
    {
        "intents": "how worth hard mistakes help",
        "actions": "save money for {}|put money aside for {}|*build up savings for {};"
        "get a loan for {}|borrow money for {}|*take on debt for {};"
        "spend less on {}|cut the cost of {}|*economize on {}",
        "things": "college|university|*higher education; a vacation|a holiday|*a trip abroad;"
        "a wedding|a marriage ceremony; a funeral|a burial; a house|a home; health care|"
        "medical care; child care|day care; groceries|food; *Christmas|*the festive season",
    },
    {
        "intents": "how hard help mistakes",
        "actions": "get rid of {}|cure {}|*make {} go away; prevent {}|avoid getting {}|"
        "*ward off {}; recognize {}|identify {}|*spot the signs of {};"
        "live with {}|cope with {}|*manage {}",
        "things": "the flu|influenza; insomnia|sleeplessness; acne|pimples|*zits; heartburn|"
        "acid reflux; high blood pressure|hypertension; back pain|a sore back|*a bad back;"
        "hay fever|a pollen allergy; tooth decay|cavities; a stomachache|a bellyache|"
        "*tummy pain; *nearsightedness|*myopia",
    },
    {
        "intents": "how cost hard mistakes help",
        "actions": "train {}|teach {} to obey|*get {} to follow commands; feed {}|"
        "choose food for {}|*keep {} well fed; adopt {}|take in {}|*give {} a home;"
        "wash {}|bathe {}|*give {} a bath",
        "things": "a puppy|a young dog|*a pup; a kitten|a young cat|*a baby cat; a rabbit|"
        "a bunny; a pony|a small horse; a parakeet|a budgie; a turtle|a tortoise;"
        "a lamb|a young sheep; *a rooster|*a cockerel",
    },
    {
        "intents": "how cost worth hard mistakes",
        "actions": "visit {}|see {}|*take a trip to {}; move to {}|relocate to {}|*settle in {};"
        "find a job in {}|get work in {}|*land a position in {}; go to college in {}|"
        "attend university in {}; open a shop in {}|start a store in {}",
        "things": "New York|NYC|*the Big Apple; the Netherlands|Holland; the United States|"
        "America|*the USA; Britain|the UK|*the United Kingdom; Rome|the Italian capital;"
        "Paris|the French capital; Tokyo|the Japanese capital; Berlin|the German capital;"
        "Los Angeles|LA; *Madrid|*the Spanish capital; *Moscow|*the Russian capital",
    },
    {
        "intents": "how time cost worth",
        "actions": "fly {}|take a plane {}|*travel by air {}; drive {}|go by car {}|"
        "*travel by road {}; take the train {}|go by rail {}; ship a package {}|send a parcel {}",
        "things": "from Boston to Chicago; from Chicago to Boston; from Boston to Denver;"
        "from Denver to Boston; from Denver to Chicago; from Chicago to Denver;"
        "*from Dallas to Miami; *from Miami to Dallas; *from Miami to Seattle",
    },
    {
        "intents": "how time hard help mistakes",
        "actions": "delete {}|erase {}|*wipe {}; recover {}|get {} back|*restore {};"
        "hide {}|keep {} private|*conceal {}; back up {}|make a copy of {}|*duplicate {}",
        "things": "photos|pictures|*snapshots; files|documents; text messages|SMS messages;"
        "bookmarks|saved links; voice recordings|audio clips; movies|films|*video files;"
        "contacts|phone numbers; *passwords|*login codes",
    },
    {
        "intents": "how time cost hard help",
        "actions": "speed up {}|make {} faster|*boost the performance of {}; set up {}|"
        "get {} ready for use; connect {} to the internet|get {} online;"
        "unlock {}|get into {} without the code",
        "things": "a laptop|a notebook computer; a cell phone|a mobile phone|*a smartphone;"
        "a TV|a television set|*a telly; a tablet|a tablet computer; a printer|a printing device;"
        "*an e-reader|*a Kindle",
    },
    {
        "intents": "how time hard help mistakes",
        "actions": "learn {}|study {}|*get the hang of {}; teach {}|give lessons in {}|"
        "*instruct a class in {}; pass an exam in {}|get through a test in {}|"
        "*succeed in an examination in {}",
        "things": "math|mathematics; programming|coding|*software development; public speaking|"
        "giving speeches|*oratory; photography|taking photographs; sewing|needlework; drawing|"
        "sketching; handwriting|penmanship; typing|keyboarding; *astronomy|*the study of stars",
    },
    {
        "intents": "how worth hard mistakes help",
        "actions": "ask for {}|request {}; turn down {}|refuse {}|*decline {};"
        "negotiate {}|discuss the terms of {}; accept {}|say yes to {}|*agree to {}",
        "things": "a raise|a pay increase|*a higher salary; a promotion|a higher position;"
        "time off|leave|*a few days off; an internship|a trainee position; overtime|"
        "extra hours; remote work|working from home|*telecommuting; *early retirement|"
        "*an early pension",
    },
    {
        "intents": "how worth hard mistakes help",
        "actions": "start {}|take up {}|*get into {}; give up {}|quit {}|*stop {};"
        "get better at {}|improve at {}|*become good at {};"
        "make a living from {}|earn money with {}",
        "things": "jogging|running; table tennis|ping-pong; weightlifting|lifting weights;"
        "hiking|hill walking|*trekking; cycling|riding a bike|*biking; rock climbing|"
        "scaling cliffs; fishing|angling; horse riding|horseback riding; *skating|*gliding on ice",
    },
    {
        "intents": "how hard mistakes help",
        "actions": "entertain {}|amuse {}|*keep {} busy; calm {}|soothe {}|*settle {} down;"
        "apologize to {}|say sorry to {}; surprise {}|give {} a surprise;"
        "share a home with {}|live with {}",
        "things": "a toddler|a small child; a teenager|an adolescent|*a teen; my grandmother|"
        "my grandma|*my granny; my dad|my father; my mom|my mother|*my mum; my boss|"
        "my manager|*my supervisor; my friend|my pal|*my buddy; my roommate|my flatmate",
    },
]

# ---- Scenes for STS and NLI ------------------------------------------------------------------

WEIGHTS = {"agent": 0.20, "action": 0.35, "object": 0.30, "setting": 0.15}
PARTIAL = 0.3
AGENT_GROUPS = [
    "a man|a guy|*a fellow; a woman|a lady; an old man|an elderly man|*an aged man;"
    "an old woman|an elderly woman|*a grandmother",
    "a child|a kid|*a youngster; a teenager|an adolescent|*a teen; a little boy|a small boy;"
    "a little girl|a small girl",
    "a doctor|a physician|*a medic; a police officer|a cop; a soldier|a member of the army;"
    "a teacher|a schoolteacher|*an instructor; a lawyer|an attorney",
    "a tourist|a sightseer|*a vacationer; a student|a pupil; a driver|a motorist;"
    "a thief|a robber|*a burglar; a baker|a pastry cook",
]
ADVERBS = "slowly|quickly|carefully|quietly|happily|calmly|*hastily|*cautiously|*cheerfully"
INDOOR = (
    "at home|in the house; in the morning|early in the day; at night|after dark|*late at night;"
    "at noon|in the middle of the day|*at midday; upstairs|on the upper floor;"
    "in a hotel|in an inn; in the hall|in the corridor|*in the hallway"
)
OUTDOOR = (
    "in the garden|in the yard|*in the backyard; in the street|on the road; in the rain|"
    "in wet weather; near a lake|by a lake|*at the edge of a lake; in the woods|in a forest|"
    "*among the trees; by the sea|on the coast|*on the shore; at night|after dark|"
    "*late at night; in the morning|early in the day; in the city|in town|*downtown"
)
SCENE_DOMAINS = [
    {
        "kind": "food",
        "settings": INDOOR,
        "actions": "cutting|slicing|*chopping; washing|rinsing; eating|munching on|*chewing on;"
        "cooking|preparing; buying|purchasing; throwing away|getting rid of|*discarding",
        "objects": "some vegetables|some veggies; a potato|a spud; some shrimp|some prawns;"
        "an eggplant|an aubergine; some corn|some maize; some steak|some beef; *a zucchini|"
        "*a courgette",
    },
    {
        "kind": "a musical instrument",
        "settings": INDOOR,
        "actions": "playing|performing on; tuning|adjusting; repairing|fixing|*mending;"
        "buying|purchasing; carrying|lugging|*hauling; looking at|staring at|*gazing at",
        "objects": "a violin|a fiddle; a piano|a keyboard; a guitar|an acoustic guitar;"
        "a set of drums|a drum kit; a harmonica|a mouth organ; *a cello|*a violoncello",
    },
    {
        "kind": "a vehicle",
        "settings": OUTDOOR,
        "actions": "washing|cleaning; repairing|fixing|*mending; pushing|shoving; photographing|"
        "taking a picture of|*snapping a photo of; displaying|exhibiting|*showing off;"
        "drawing|sketching",
        "objects": "a car|an automobile; a bicycle|a bike; a motorcycle|a motorbike; a truck|"
        "a lorry; a taxi|a cab; a van|a minivan; *a streetcar|*a tram",
    },
    {
        "kind": "something to read",
        "settings": INDOOR,
        "actions": "reading|going through|*studying; tearing up|ripping up|*shredding; "
        "writing|composing; hiding|concealing; searching for|looking for|*hunting for;"
        "throwing away|getting rid of|*discarding",
        "objects": "a newspaper article|a press report; a letter|a written message; a poem|"
        "some verse; a novel|a book of fiction; a diary|a journal; *a manual|*a guidebook",
    },
    {
        "kind": "an animal",
        "settings": OUTDOOR,
        "actions": "feeding|giving food to; petting|stroking|*caressing; chasing|running after|"
        "*pursuing; bathing|washing; photographing|taking a picture of|*snapping a photo of;"
        "searching for|looking for|*hunting for",
        "objects": "a dog|a hound|*a canine; a cat|a kitty|*a feline; a rabbit|a bunny;"
        "a horse|a stallion; a donkey|a mule; a pig|a hog; *a rooster|*a cockerel",
    },
    {
        "kind": "a piece of furniture",
        "settings": INDOOR,
        "actions": "carrying|lugging|*hauling; painting|putting paint on; breaking|smashing|"
        "*wrecking; building|constructing|*putting together; dusting|wiping the dust off;"
        "displaying|exhibiting|*showing off",
        "objects": "a sofa|a couch|*a settee; a closet|a wardrobe; a chair|a seat; a cabinet|"
        "a cupboard; a desk|a writing table; *a crib|*a baby bed",
    },
    {
        "kind": "clothing",
        "settings": INDOOR,
        "actions": "putting on|slipping into|*getting into; washing|laundering; sewing|stitching;"
        "ironing|pressing; folding up|folding; buying|purchasing",
        "objects": "a coat|an overcoat; a sweater|a pullover|*a jumper; some pants|some trousers;"
        "a dress|a gown; a T-shirt|a tee; *a necktie|*a cravat",
    },
    {
        "kind": "an electronic device",
        "settings": INDOOR,
        "actions": "switching on|turning on|*activating; switching off|turning off|*shutting off;"
        "repairing|fixing|*mending; unpacking|unwrapping; displaying|exhibiting|*showing off;"
        "breaking|smashing|*wrecking",
        "objects": "a TV|a television; a cell phone|a mobile phone|*a smartphone; a laptop|"
        "a notebook computer; a loudspeaker|a sound box; a video camera|a camcorder;"
        "*a calculator|*an adding machine",
    },
    {
        "kind": "sports equipment",
        "settings": OUTDOOR,
        "actions": "throwing|tossing|*hurling; catching|grabbing; chasing|running after|"
        "*pursuing; kicking|giving a kick to; searching for|looking for|*hunting for;"
        "hiding|concealing",
        "objects": "a soccer ball|a football; a frisbee|a flying disc; a basketball;"
        "a tennis ball; a beach ball; *a shuttlecock|*a birdie",
    },
]
IDLE = "sound asleep|doing nothing at all|sitting still with empty hands|taking a nap"

# ---- Names ------------------------------------------------------------------------------------


def split_names(group: str, train: bool) -> list[str]:
    """Split ``a|b|*c`` into its names; a training file gets none of the held-out ones."""
    names = group.split("|")
    return [name.lstrip("*") for name in names if not (train and name.startswith("*"))]


def split_concepts(table: str, train: bool) -> list[list[str]]:
    """Split ``a|b; c|*d`` into concepts, each a list of names."""
    groups = (split_names(group.strip(), train) for group in table.split(";"))
    return [names for names in groups if names]


def to_sentence(text: str, end: str = ".") -> str:
    """Correct a/an in a filled template, capitalise it and add the final punctuation."""
    text = re.sub(r"\ba (?=[aeio]|u(?!s|ni))", "an ", text.strip())
    return text[0].upper() + text[1:] + end


# ---- Sentiment rows ---------------------------------------------------------------------------


def opinion(rng: Random, template: str, polarity: int, film: str, train: bool) -> str:
    """Fill in a template: praise if the polarity is 1, blame if it is -1."""
    first, second = rng.sample(split_names(ASPECTS, train), 2)
    slots = {"A": first, "B": second, "F": film}
    for slot, table in SLOTS.items():
        slots[slot] = rng.choice(split_names(table, train))
    for slot, table in POLAR_WORDS.items():
        slots[slot] = rng.choice(split_names(table[polarity], train))
        slots["X" + slot] = rng.choice(split_names(table[-polarity], train))
    return template.format(**slots)


def sst_row(rng: Random, train: bool) -> tuple[tuple[str], str]:
    """Return one sentence and its class."""
    label = rng.randrange(5)
    templates = {0: NEUTRAL, 1: MILD + SHORT_MILD, 2: STRONG + SHORT_STRONG}[abs(label - 2)]
    polarity = rng.choice([-1, 1]) if label == 2 else (label > 2) - (label < 2)
    film = rng.choice(split_names(FILMS, train))
    text = to_sentence(opinion(rng, rng.choice(templates), polarity, film, train))
    if rng.random() < SST_NOISE:
        label += {0: 1, 4: -1}.get(label, rng.choice([-1, 1]))
    return (text,), str(label)


def cfimdb_row(rng: Random, train: bool) -> tuple[tuple[str], str]:
    """Return a review (an opening, perhaps the plot, opinions, a verdict) and its label."""
    label = rng.randrange(2)
    polarity = 2 * label - 1
    film = rng.choice(split_names(FILMS, train))

    def say(templates: list[str], polarity: int, lead: str = "") -> str:
        return to_sentence(lead + opinion(rng, rng.choice(templates), polarity, film, train))

    sentences = [say(OPENINGS, polarity)]
    opinions = rng.choice([1, 2, 2])
    if opinions == 1:
        sentences.append(say(PLOT_LINES, polarity))
    previous = 0
    for _ in range(opinions):
        current = polarity if rng.random() < AGREE else -polarity
        leads = {0: [""], current: SAME_POLARITY}.get(previous, OTHER_POLARITY)
        sentences.append(say(rng.choice([MILD, STRONG]), current, rng.choice(leads)))
        previous = current
    sentences.append(say(rng.choice([MILD, STRONG]), polarity, rng.choice(VERDICT_LEADS)))
    if rng.random() < CFIMDB_NOISE:
        label = 1 - label
    return (" ".join(sentences),), str(label)


# ---- Pair rows --------------------------------------------------------------------------------


def choose_names(
    rng: Random, first: dict[str, list[str]], second: dict[str, list[str]], rate: float
) -> tuple[dict[str, str], dict[str, str]]:
    """Choose a name for each concept; a shared concept gets two names with probability `rate`."""
    one = {part: rng.choice(names) for part, names in first.items()}
    two = {part: rng.choice(names) for part, names in second.items()}
    for part in first:
        if first[part] == second[part]:
            others = [name for name in first[part] if name != one[part]]
            two[part] = rng.choice(others) if others and rng.random() < rate else one[part]
    return one, two


def question_concepts(domain: dict[str, str], train: bool) -> dict[str, list[list[str]]]:
    """Return the concepts of a domain for each part of a question."""
    return {
        "intent": [split_names(INTENTS[intent], train) for intent in domain["intents"].split()],
        "action": split_concepts(domain["actions"], train),
        "thing": split_concepts(domain["things"], train),
    }


def question(names: dict[str, str]) -> str:
    """Put the parts of a question together."""
    return to_sentence(names["intent"].format(names["action"].format(names["thing"])), "?")


def quora_row(rng: Random, train: bool) -> tuple[tuple[str, str], str]:
    """Return two questions and whether they are duplicates."""
    different = rng.choices(list(QUORA_KINDS), list(QUORA_KINDS.values()))[0]
    duplicate = not different
    domain, other_domain = rng.sample(QUESTION_DOMAINS, 2)
    options = question_concepts(domain, train)
    first = {part: rng.choice(choices) for part, choices in options.items()}
    second = dict(first)
    if different == "domain":
        options = question_concepts(other_domain, train)
        second = {part: rng.choice(choices) for part, choices in options.items()}
    else:
        for part in different.split():
            second[part] = rng.choice([names for names in options[part] if names != first[part]])
    one, two = choose_names(rng, first, second, QUORA_REWORDING[duplicate])
    label = duplicate != (rng.random() < QUORA_NOISE)
    return (question(one), question(two)), f"{float(label)}"


def scene_concepts(domain: dict[str, str], train: bool) -> dict[str, list[list[str]]]:
    """Return the concepts of a domain for each part of a scene."""
    return {
        "agent": [names for group in AGENT_GROUPS for names in split_concepts(group, train)],
        "action": split_concepts(domain["actions"], train),
        "object": split_concepts(domain["objects"], train),
        "setting": split_concepts(domain["settings"], train),
    }


def related(part: str, one: list[str], two: list[str], same_domain: bool, train: bool) -> bool:
    """Tell whether two different concepts are related.

    Agents are related within a group, actions and objects within a domain, and no setting is
    related to any setting.
    """
    if part == "agent":
        groups = [split_concepts(group, train) for group in AGENT_GROUPS]
        return any(one in group and two in group for group in groups)
    return [""] in (one, two) if part == "setting" else same_domain


def scene(rng: Random, names: dict[str, str], train: bool) -> str:
    """Describe a scene in one of three word orders; without a setting it gets an adverb."""
    adverb = "" if names["setting"] else rng.choice(split_names(ADVERBS, train))
    act = f"{adverb} {names['action']} {names['object']}".strip()
    orders = [f"{names['agent']} is {act} {names['setting']}"] * 4
    orders.append(f"there is {names['agent']} {act} {names['setting']}")
    if names["setting"]:
        orders.append(f"{names['setting']}, {names['agent']} is {act}")
    return to_sentence(rng.choice(orders))


def sts_row(rng: Random, train: bool) -> tuple[tuple[str, str], str]:
    """Return two scenes and their similarity."""
    same_domain = rng.random() >= UNRELATED
    domain, other_domain = rng.sample(SCENE_DOMAINS, 2)
    first, second = (
        {part: rng.choice(choices) for part, choices in scene_concepts(each, train).items()}
        for each in (domain, domain if same_domain else other_domain)
    )
    for parts in (first, second):
        if rng.random() < NO_SETTING:
            parts["setting"] = [""]
    if same_domain:
        keep = rng.choice(KEEP_RATES)
        second |= {part: first[part] for part in first if rng.random() < keep}
    similarity = 0.0
    for part, weight in WEIGHTS.items():
        if first[part] == second[part]:
            similarity += 5 * weight
        elif related(part, first[part], second[part], same_domain, train):
            similarity += 5 * weight * PARTIAL
    one, two = choose_names(rng, first, second, STS_REWORDING[similarity > 3])
    sentences = scene(rng, one, train), scene(rng, two, train)
    similarity = min(5.0, max(0.0, similarity + rng.choice(STS_NOISE)))
    return sentences, f"{similarity:.1f}"


def nli_row(rng: Random) -> tuple[str, str, str]:
    """Return a scene, an entailed sentence and a contradicting one."""
    domain = rng.choice(SCENE_DOMAINS)
    options = scene_concepts(domain, train=True)
    first = {part: rng.choice(choices) for part, choices in options.items()}
    one, two = choose_names(rng, first, first, 0.6)
    two |= rng.choice([{}, {"object": domain["kind"]}, {"agent": "someone"}])
    if rng.random() < 0.25:
        change = {"action": rng.choice(split_names(IDLE, train=True)), "object": ""}
    else:
        part = rng.choice(["action", "object"])
        other = rng.choice([names for names in options[part] if names != first[part]])
        change = {part: rng.choice(other)}
    return tuple(scene(rng, names, train=True) for names in (one, two, one | change))


# ---- Files ------------------------------------------------------------------------------------

TASKS = {
    "ids-sst": (sst_row, ["sentence", "sentiment"]),
    "ids-cfimdb": (cfimdb_row, ["sentence", "sentiment"]),
    "quora": (quora_row, ["sentence1", "sentence2", "is_duplicate"]),
    "sts": (sts_row, ["sentence1", "sentence2", "similarity"]),
}


def row_key(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Return what identifies a row: its sentences, without case, punctuation and order."""
    return tuple(sorted(" ".join(re.findall(r"[a-z0-9']+", text.lower())) for text in texts))


def write_csv(path: Path, rows: list[list[str]], delimiter: str) -> None:
    """Write a csv file, which appears under its name only when it is complete."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)
    os.replace(draft, path)


def make_task(out: Path, task: str, seed: int) -> None:
    """Write the train, dev and test file of a task; no row occurs twice in them."""
    make_row, columns = TASKS[task]
    rng = Random(f"{task} {seed}")
    seen: set[tuple[str, ...]] = set()
    for split, size in SIZES.items():
        header = ["", "id", *columns]
        rows: list[list[str]] = []
        while len(rows) < size:
            texts, label = make_row(rng, split == "train")
            key = row_key(texts)
            if key in seen or len(set(key)) < len(key):
                continue
            seen.add(key)
            rows.append([str(len(rows)), f"{rng.getrandbits(100):025x}", *texts, label])
        if split == "test-student":
            header, rows = header[:-1], [row[:-1] for row in rows]
        write_csv(out / f"{task}-{split}.csv", [header, *rows], "\t")


def make_nli(out: Path, seed: int) -> None:
    """Write the NLI triples."""
    rng = Random(f"nli {seed}")
    triples: dict[tuple[str, ...], list[str]] = {}
    while len(triples) < NLI_SIZE:
        texts = nli_row(rng)
        key = row_key(texts)
        if len(set(key)) == len(key):
            triples.setdefault(key, list(texts))
    header = ["sent0", "sent1", "hard_neg"]
    write_csv(out / "nli_for_simcse.csv", [header, *triples.values()], ",")


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description="Generate the sample data set.")
    default = Path(__file__).resolve().parent / "sample"
    parser.add_argument("--out", type=Path, default=default, help="output folder")
    parser.add_argument("--seed", type=int, default=11711, help="random seed")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        make_task(args.out, task, args.seed)
    make_nli(args.out, args.seed)


if __name__ == "__main__":
    main()
