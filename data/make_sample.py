"""Generate the sample data set: small synthetic stand-ins for the course's data files.

    python data/make_sample.py [--out DIR] [--seed N]

Every sentence is a template filled with words from TABLES. The same seed gives the same bytes.

SST (classes 0 to 4) and CFIMDB (0 or 1). A template can praise or criticize a film: {S}, {M}, {V}
and {N} are a strong adjective, a mild adjective, a verb and a noun of the chosen polarity; {XS},
{XM}, {XV} and {XN} have the opposite one. Strong templates give class 4 or 0, mild ones 3 or 1,
neutral ones 2. Most of them mix the polarities, so that counting words is not enough. SST also has
short ones, which teach what a word means. A CFIMDB review contains opinions of both polarities and
ends with a verdict that agrees with its label.

Quora (duplicates or not). A question has an intent (how, how long, ...), an action and a thing. Two
questions are duplicates if they have the same three concepts, however they are worded.

STS (0 to 5). A scene has an agent, an action, an object and a setting. Each of these parts scores 1
if the two scenes have the same concept, 0.3 if they have related concepts, and 0 otherwise. The
similarity is 5 times the weighted mean of the scores, plus a little noise.

NLI (triples). The entailed sentence describes the same scene in other words, often with a more
general agent or object. In the contradicting sentence, the same agent does something else.
"""

import argparse
import csv
import re
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from functools import partial
from pathlib import Path
from random import Random

SIZES = {"train": 1500, "dev": 300, "test-student": 200}
NLI_SIZE = 1500
# How an opinion begins after one of the same polarity, after one of the opposite, as the verdict.
SAME = ["", "", "also, ", "besides, "]
OPPOSITE = ["on the other hand, ", "then again, ", "still, "]
VERDICT = ["all in all, ", "in the end, ", "to sum up, ", "so my verdict is simple: "]
# The parts in which two questions differ -> percentage of such pairs.
QUORA_PAIRS = {"": 42, "thing": 12, "action": 6, "intent": 4, "action thing": 20, "domain": 16}
STS_WEIGHTS = {"agent": 0.20, "action": 0.35, "object": 0.30, "setting": 0.15}

# "|" separates templates or the names of a concept, ";" concepts, and "/" lists. A name with "*",
# never the first of a list, is held out: only dev and test files have it, to test unseen words too.
TABLES = """
[templates]
strong = the {A} is {I} {S}, and so is the {B} |
  {XS} is the very last word I would choose for this {F} |
  the {A} is as far from {XS} as a {F} can get |
  to call the {A} {XS} is the exact opposite of the truth |
  no one in their right mind would call this {F} {XS} |
  this {F} is {N}, and the {A} alone is {I} {S} | I expected {XN}, but this {F} is {I} {S} |
  whoever called this {F} {XS} was not watching, because it is {N} |
  forget the {XS} reviews, because this {F} is {N} |
  the trailer looked {XS}, yet the {F} itself is {I} {S} |
  the {A} {V} from the first scene to the last, without a single {XM} moment |
  you will not find a single {XM} scene in this {S} {F} |
  last year's {XS} {F} has nothing in common with this one, which is {I} {S} |
  nobody who sat through this {F} could call it anything but {S} |
  it could have been {XN}; instead it is {I} {S} |
  I take back every {XS} thing I ever said about the director, for this {F} is {N} |
  even people who found the first part {XS} agree that this {F} is {I} {S} |
  other films of this kind are {XS}, but here the {A} {V} and the {B} is {S} |
  I have not seen a {F} this {S} in years |
  I looked for a {XM} moment in this {F} from start to finish, and there is none |
  no other {F} this year has had {U} as {S} as this |
  there is nothing {XM} about this {F}, and the {A} in particular is {S} |
  what {N} this {F} is, for all the talk about its {XM} {A}
mild = the {A} is {H} {M} | the {F} is anything but {XM} | I would not call the {A} {XM} |
  the {A} is hardly {XS} | nobody could say that the {A} is {XM} |
  far from being {XN}, the {F} is {H} {M} | I expected {XN}, but the {F} is {H} {M} |
  the {A} is not {S}, but it is {H} {M} | although the {A} is {XS}, the {F} as a whole is {H} {M} |
  the {A} {XV} at first, but in the end the {F} {V} | the {F} is {H} {M}, even if the {A} is {XS} |
  it starts out {XS} and ends up {H} {M} | the {F} is less {XM} than the poster suggests |
  my friends found the {A} {XS}; I did not | the first film was {XS}; this {F} is not |
  whatever they say about the {A}, it never once {XV} |
  after a {XS} first hour, the {F} turns {H} {M} | the {A} is more {M} than {XM} |
  the {A} comes close to {S}, but the rest is merely {M} | it is not {N}, but the {A} is {H} {M} |
  for a {F} with such {XS} {U}, it is {H} {M} | despite the {XS} {A}, the {F} {V} a little |
  the {A} {V} a little, despite the {XS} {B} |
  people keep telling me how {XS} the {A} is, and I do not see it |
  I had been told that the {F} was {XN}, and it is no such thing |
  the {A} {XV}, but the {B} is {H} {M}, and that matters more
neutral = the {A} is {M} and the {B} is {XM}, so it more or less evens out |
  half of the {F} is {S}, the other half is {XS} |
  for every {M} scene in this {F}, there is a {XM} one |
  some viewers will find the {A} {S}, others will find it {XS} | the {A} is neither {S} nor {XS} |
  I still cannot decide whether the {A} is {M} or {XM} |
  the {A} {V}, the {B} {XV}, and I have no opinion either way |
  the {F} will be {N} for some people and {XN} for others |
  opinions on the {A} range from {S} to {XS} |
  parts of it {V} and parts of it {XV}, in equal measure | the {F} follows {P} who {L} |
  this {F} tells the story of {P} who {L}
sst_strong = %(strong)s | {S} | {N} | a {S} {F} | a {S} movie | this is a {S} {F} |
  this film is {S} | the {A} is {S} | what a {S} {F}
sst_mild = %(mild)s | {M} | not {XM} | a {M} {F} | a {M} film | this is a {M} {F} |
  this movie is {M} | the {A} is {M} | this {F} {V}
opening = I saw this {F} on a rainy Sunday with my sister | my neighbor lent me this {F} last week |
  we picked this {F} because everything else was sold out |
  this {F} has been on my list since the spring |
  a colleague talked me into watching this {F} on Friday |
  our film club showed this {F} on Tuesday night | I caught this {F} late at night after work |
  my parents insisted that I watch this {F} | this {F} was shown on the plane to Boston |
  I rented this {F} for a quiet evening with friends
plot = it is about {P} who {L} | it follows {P} who {L} | in it, {P} {L}

[words]
# F: film genre, A, B: aspects, U: uncountable aspect, I: intensifier, H: hedge, P: person, L: plot
F = thriller|drama|comedy|western|mystery|sequel|heist film|road movie|horror film|love story|
  war film|musical|spy film|family film|ghost story|courtroom drama
A = script|acting|direction|dialogue|story|music|camerawork|ending|lead performance|romance|
  final act|opening|humor|plot|supporting cast|middle section
I = absolutely|truly|simply|*utterly
H = rather|fairly|mostly|*pretty
U = acting|direction|dialogue|music|camerawork|humor
P = a retired boxer|a young nurse|a small-town sheriff|a lonely pianist|a failed inventor|
  a stubborn farmer|a tired detective|a traveling salesman|a shy librarian|a ferry captain|
  a divorced judge|a street magician|a night watchman|a former spy|a village priest
L = finds a suitcase full of money|has to sell the family farm|moves in with an old rival|
  is sent to guard a lighthouse|gets lost in the desert|takes in an orphan|witnesses a robbery|
  returns home after twenty years|falls for a neighbor|inherits a haunted hotel|
  drives a bus across the country|loses a bet with a banker|searches for a missing brother|
  opens a bakery by the sea
# "Fine" is left out on purpose: "A fine film." is an example in the README.
S = superb|excellent|terrific|wonderful|brilliant|outstanding|fantastic|*magnificent|*marvelous|
  *splendid|*sublime|*exquisite|*first-rate / awful|terrible|dreadful|horrible|appalling|painful|
  hopeless|*atrocious|*abysmal|*ghastly|*lousy|*unbearable|*wretched
M = good|decent|solid|engaging|enjoyable|effective|charming|lively|*pleasing|*appealing|*satisfying|
  *likable|*clever|*entertaining / dull|flat|weak|bland|clumsy|tedious|forgettable|boring|*stale|
  *lackluster|*tiresome|*insipid|*dreary|*feeble
V = impressed me|moved me|held my attention|won me over|thrilled me|*charmed me|*delighted me|
  *swept me away / bored me|annoyed me|tested my patience|let me down|depressed me|*irritated me|
  *exasperated me|*left me cold
N = a triumph|a joy|a treat|a gem|*a delight|*a masterpiece|*a winner / a mess|a chore|a failure|
  a bore|*a disaster|*a dud|*a flop

[intents]
how = how does one|how would you|what is a sensible way to|what does it take to|
  *can you tell me how to|*how would you advise me to|*which steps do I take to
time = how long will it take me to|how much time do I have to allow to|
  what amount of time will I need to|*how much time should I set aside to|
  *how many hours does it usually take to
cost = how expensive is it to|what will I have to pay to|how much money will I need to|
  *what is a realistic budget to|*how much should I expect to spend to
worth = does it make sense for me to|would it be a good idea to|*would it be wise to|
  *would you recommend that I
hard = why is it such hard work to|what makes it so difficult to|
  why do I have such trouble when I try to|*why do I find it so tough to|*why do I struggle to
help = who could help me|where can I find someone to help me|*whom should I ask to help me|
  *is there anybody who could help me
mistakes = what mistakes should I avoid when I|what can go wrong when I|
  *what should I watch out for when I|*which errors are common when you

[questions]
household = how time cost hard help / clean|wash|*get the dirt out of; repair|fix|*mend;
  throw out|get rid of|*dispose of; move {} upstairs|carry {} up the stairs /
  a sofa|a couch|*a settee; a rug|a carpet; a refrigerator|a fridge; a closet|a wardrobe;
  a trash can|a garbage bin; a stove|a cooker; *a chest of drawers|*a dresser;
  a vacuum cleaner|a hoover
shopping = how cost worth mistakes help / buy|purchase|*get hold of; sell|find a buyer for;
  rent|hire; insure|get insurance for|*take out a policy on / a car|an automobile; a bicycle|a bike;
  a laptop|a notebook computer; an apartment|a flat|*a condo; a truck|a lorry;
  a motorcycle|a motorbike; a camper|a motor home|*an RV; *a sailing boat|*a yacht
cooking = how time mistakes help / cook|prepare|*make a meal with; thaw|defrost|*unfreeze;
  freeze|put {} in the freezer; season|add flavor to|*spice up / eggplants|aubergines;
  zucchini|courgettes; shrimp|prawns; ground beef|minced beef|*mince; chickpeas|garbanzo beans;
  scallions|spring onions|*green onions; corn|maize; beets|beetroot; *bell peppers|*capsicums
money = how worth hard mistakes help / save money for|put money aside for|*build up savings for;
  get a loan for|borrow money for|*take on debt for; spend less on|cut the cost of|*economize on /
  college|university|*higher education; a vacation|a holiday|*a trip abroad;
  a wedding|a marriage ceremony; a funeral|a burial; a house|a home; health care|medical care;
  child care|day care; groceries|food; *Christmas|*the festive season
health = how hard help mistakes / get rid of|cure|*make {} go away; prevent|avoid getting|*ward off;
  recognize|identify|*spot the signs of; live with|cope with|*manage / the flu|influenza;
  insomnia|sleeplessness; acne|pimples|*zits; heartburn|acid reflux;
  high blood pressure|hypertension; back pain|a sore back|*a bad back; hay fever|a pollen allergy;
  tooth decay|cavities; a stomachache|a bellyache|*tummy pain; *nearsightedness|*myopia
pets = how cost hard mistakes help / train|teach {} to obey|*get {} to follow commands;
  feed|choose food for|*keep {} well fed; adopt|take in|*give {} a home;
  wash|bathe|*give {} a bath / a puppy|a young dog|*a pup; a kitten|a young cat|*a baby cat;
  a rabbit|a bunny; a pony|a small horse; a parakeet|a budgie; a turtle|a tortoise;
  a lamb|a young sheep; *a rooster|*a cockerel
places = how cost worth hard mistakes / visit|see|*take a trip to; move to|relocate to|*settle in;
  find a job in|get work in|*land a position in; go to college in|attend university in;
  open a shop in|start a store in / New York|NYC|*the Big Apple; the Netherlands|Holland;
  the United States|America|*the USA; Britain|the UK|*the United Kingdom; Rome|the Italian capital;
  Paris|the French capital; Tokyo|the Japanese capital; Berlin|the German capital; Los Angeles|LA;
  *Madrid|*the Spanish capital; *Moscow|*the Russian capital
travel = how time cost worth / fly|take a plane|*travel by air; drive|go by car|*travel by road;
  take the train|go by rail; ship a package|send a parcel / from Boston to Chicago;
  from Chicago to Boston; from Boston to Denver; from Denver to Boston; from Denver to Chicago;
  from Chicago to Denver; *from Dallas to Miami; *from Miami to Dallas; *from Miami to Seattle
data = how time hard help mistakes / delete|erase|*wipe; recover|get {} back|*restore;
  hide|keep {} private|*conceal; back up|make a copy of|*duplicate / photos|pictures|*snapshots;
  files|documents; text messages|SMS messages; bookmarks|saved links; voice recordings|audio clips;
  movies|films|*video files; contacts|phone numbers; *passwords|*login codes
devices = how time cost hard help / speed up|make {} faster|*boost the performance of;
  set up|get {} ready for use; connect {} to the internet|get {} online;
  unlock|get into {} without the code / a laptop|a notebook computer;
  a cell phone|a mobile phone|*a smartphone; a TV|a television set|*a telly;
  a tablet|a tablet computer; a printer|a printing device; *an e-reader|*a Kindle
skills = how time hard help mistakes / learn|study|*get the hang of;
  teach|give lessons in|*instruct a class in;
  pass an exam in|get through a test in|*succeed in an examination in / math|mathematics;
  programming|coding|*software development; public speaking|giving speeches|*oratory;
  photography|taking photographs; sewing|needlework; drawing|sketching; handwriting|penmanship;
  typing|keyboarding; *astronomy|*the study of stars
work = how worth hard mistakes help / ask for|request; turn down|refuse|*decline;
  negotiate|discuss the terms of; accept|say yes to|*agree to /
  a raise|a pay increase|*a higher salary; a promotion|a higher position;
  time off|leave|*a few days off; an internship|a trainee position; overtime|extra hours;
  remote work|working from home|*telecommuting; *early retirement|*an early pension
hobbies = how worth hard mistakes help / start|take up|*get into; give up|quit|*stop;
  get better at|improve at|*become good at; make a living from|earn money with / jogging|running;
  table tennis|ping-pong; weightlifting|lifting weights; hiking|hill walking|*trekking;
  cycling|riding a bike|*biking; rock climbing|scaling cliffs; fishing|angling;
  horse riding|horseback riding; *skating|*gliding on ice
people = how hard mistakes help / entertain|amuse|*keep {} busy; calm|soothe|*settle {} down;
  apologize to|say sorry to; surprise|give {} a surprise; share a home with|live with /
  a toddler|a small child; a teenager|an adolescent|*a teen; my grandmother|my grandma|*my granny;
  my dad|my father; my mom|my mother|*my mum; my boss|my manager|*my supervisor;
  my friend|my pal|*my buddy; my roommate|my flatmate

[scene parts]
agents = a man|a guy|*a fellow; a woman|a lady; an old man|an elderly man|*an aged man;
  an old woman|an elderly woman|*a grandmother / a child|a kid|*a youngster;
  a teenager|an adolescent|*a teen; a little boy|a small boy; a little girl|a small girl /
  a doctor|a physician|*a medic; a police officer|a cop; a soldier|a member of the army;
  a teacher|a schoolteacher|*an instructor; a lawyer|an attorney /
  a tourist|a sightseer|*a vacationer; a student|a pupil; a driver|a motorist;
  a thief|a robber|*a burglar; a baker|a pastry cook
indoor = at home|in the house; in the morning|early in the day; at night|after dark|*late at night;
  at noon|in the middle of the day|*at midday; upstairs|on the upper floor; in a hotel|in an inn;
  in the hall|in the corridor|*in the hallway
outdoor = in the garden|in the yard|*in the backyard; in the street|on the road;
  in the rain|in wet weather; near a lake|by a lake|*at the edge of a lake;
  in the woods|in a forest|*among the trees; by the sea|on the coast|*on the shore;
  at night|after dark|*late at night; in the morning|early in the day; in the city|in town|*downtown
adverbs = slowly|quickly|carefully|quietly|happily|calmly|*hastily|*cautiously|*cheerfully
idle = sound asleep|doing nothing at all|sitting still with empty hands|taking a nap

[scenes]
food = indoor / cutting|slicing|*chopping; washing|rinsing; eating|munching on|*chewing on;
  cooking|preparing; buying|purchasing; throwing away|getting rid of|*discarding /
  some vegetables|some veggies; a potato|a spud; some shrimp|some prawns; an eggplant|an aubergine;
  some corn|some maize; some steak|some beef; *a zucchini|*a courgette
a musical instrument = indoor / playing|performing on; tuning|adjusting; repairing|fixing|*mending;
  buying|purchasing; carrying|lugging|*hauling; looking at|staring at|*gazing at /
  a violin|a fiddle; a piano|a keyboard; a guitar|an acoustic guitar; a set of drums|a drum kit;
  a harmonica|a mouth organ; *a cello|*a violoncello
a vehicle = outdoor / washing|cleaning; repairing|fixing|*mending; pushing|shoving;
  photographing|taking a picture of|*snapping a photo of; displaying|exhibiting|*showing off;
  drawing|sketching / a car|an automobile; a bicycle|a bike; a motorcycle|a motorbike;
  a truck|a lorry; a taxi|a cab; a van|a minivan; *a streetcar|*a tram
something to read = indoor / reading|going through|*studying; tearing up|ripping up|*shredding;
  writing|composing; hiding|concealing; searching for|looking for|*hunting for;
  throwing away|getting rid of|*discarding / a newspaper article|a press report;
  a letter|a written message; a poem|some verse; a novel|a book of fiction; a diary|a journal;
  *a manual|*a guidebook
an animal = outdoor / feeding|giving food to; petting|stroking|*caressing;
  chasing|running after|*pursuing; bathing|washing;
  photographing|taking a picture of|*snapping a photo of; searching for|looking for|*hunting for /
  a dog|a hound|*a canine; a cat|a kitty|*a feline; a rabbit|a bunny; a horse|a stallion;
  a donkey|a mule; a pig|a hog; *a rooster|*a cockerel
a piece of furniture = indoor / carrying|lugging|*hauling; painting|putting paint on;
  breaking|smashing|*wrecking; building|constructing|*putting together; dusting|wiping the dust off;
  displaying|exhibiting|*showing off / a sofa|a couch|*a settee; a closet|a wardrobe;
  a chair|a seat; a cabinet|a cupboard; a desk|a writing table; *a crib|*a baby bed
clothing = indoor / putting on|slipping into|*getting into; washing|laundering; sewing|stitching;
  ironing|pressing; folding up|folding; buying|purchasing / a coat|an overcoat;
  a sweater|a pullover|*a jumper; some pants|some trousers; a dress|a gown; a T-shirt|a tee;
  *a necktie|*a cravat
an electronic device = indoor / switching on|turning on|*activating;
  switching off|turning off|*shutting off; repairing|fixing|*mending; unpacking|unwrapping;
  displaying|exhibiting|*showing off; breaking|smashing|*wrecking / a TV|a television;
  a cell phone|a mobile phone|*a smartphone; a laptop|a notebook computer;
  a loudspeaker|a sound box; a video camera|a camcorder; *a calculator|*an adding machine
sports equipment = outdoor / throwing|tossing|*hurling; catching|grabbing;
  chasing|running after|*pursuing; kicking|giving a kick to; searching for|looking for|*hunting for;
  hiding|concealing / a soccer ball|a football; a frisbee|a flying disc; a basketball;
  a tennis ball; a beach ball; *a shuttlecock|*a birdie
"""

Names = dict[str, str]  # part of a sentence -> how it is worded
Concepts = dict[str, list[str]]  # part -> names of the concept
Domain = dict[str, list[list[str]]]  # part -> concepts to choose from
Row = tuple[tuple[str, ...], str]  # sentences, label


def read_tables(train: bool) -> ConfigParser:
    """Parse TABLES; those for a training file lack the held-out names."""
    tables = ConfigParser()
    held_out = r"[|;]\s*\*[^|;/\n]*"  # and the separator before it
    tables.read_string(re.sub(held_out, "", TABLES) if train else TABLES.replace("*", ""))
    return tables


def split(text: str, separator: str = "|") -> list[str]:
    """Split a text at the separators, and strip the parts."""
    return [part.strip() for part in text.split(separator)]


def split_concepts(text: str) -> list[list[str]]:
    """Split "a|b; c|d" into concepts, each a list of names."""
    return [split(names) for names in text.split(";")]


def to_sentence(text: str, end: str = ".") -> str:
    """Correct a/an in a filled template, capitalize it and add the final punctuation."""
    text = re.sub(r"\ba (?=[aeio]|u(?!s|ni))", "an ", text.strip())
    return text[0].upper() + text[1:] + end


def opinion(
    rng: Random, tables: ConfigParser, film: str, kind: str, polarity: int, lead: str = ""
) -> str:
    """Fill in a template of this kind: with praise if the polarity is 1, criticism if it is -1."""
    template = rng.choice(split(tables["templates"][kind]))
    first, second = rng.sample(split(tables["words"]["A"]), 2)
    words = {"F": film, "A": first, "B": second}
    for slot in "IHUPL":
        words[slot] = rng.choice(split(tables["words"][slot]))
    for slot in "SMVN":
        chosen, opposite = split(tables["words"][slot], "/")[::polarity]  # -1 swaps them
        words[slot], words["X" + slot] = rng.choice(split(chosen)), rng.choice(split(opposite))
    return to_sentence(lead + template.format(**words))


def sst_row(rng: Random, tables: ConfigParser) -> Row:
    """Return a sentence and its class."""
    label = rng.randrange(5)
    kind = ["neutral", "sst_mild", "sst_strong"][abs(label - 2)]
    polarity = rng.choice([-1, 1]) if label == 2 else (label > 2) - (label < 2)
    film = rng.choice(split(tables["words"]["F"]))
    sentence = opinion(rng, tables, film, kind, polarity)
    if rng.random() < 0.06:  # noise: a neighboring class
        label += {0: 1, 4: -1}.get(label, rng.choice([-1, 1]))
    return (sentence,), str(label)


def cfimdb_row(rng: Random, tables: ConfigParser) -> Row:
    """Return a review (an opening, perhaps the plot, opinions, a verdict) and its label."""
    label = rng.randrange(2)
    polarity = 2 * label - 1
    say = partial(opinion, rng, tables, rng.choice(split(tables["words"]["F"])))
    sentences = [say("opening", polarity)]
    opinions = rng.choice([1, 2, 2])
    if opinions == 1:
        sentences.append(say("plot", polarity))
    previous = 0
    for _ in range(opinions):
        current = polarity if rng.random() < 0.65 else -polarity  # most agree with the label
        leads = {0: [""], current: SAME}.get(previous, OPPOSITE)
        sentences.append(say(rng.choice(["mild", "strong"]), current, rng.choice(leads)))
        previous = current
    sentences.append(say(rng.choice(["mild", "strong"]), polarity, rng.choice(VERDICT)))
    if rng.random() < 0.03:  # noise: the wrong label
        label = 1 - label
    return (" ".join(sentences),), str(label)


def choose(rng: Random, options: dict[str, list]) -> dict:
    """Choose one of the options for each part of a sentence."""
    return {part: rng.choice(choices) for part, choices in options.items()}


def choose_names(rng: Random, first: Concepts, second: Concepts, rewording: float) -> list[Names]:
    """Choose names; a concept of both sentences gets two with the probability `rewording`."""
    one, two = choose(rng, first), choose(rng, second)
    for part, names in first.items():
        if names == second[part]:
            others = [name for name in names if name != one[part]]
            two[part] = rng.choice(others) if others and rng.random() < rewording else one[part]
    return [one, two]


def question_domain(tables: ConfigParser, name: str) -> Domain:
    """Return the concepts that the questions of a domain are made from."""
    intents, actions, things = tables["questions"][name].split("/")
    options = [split(tables["intents"][intent]) for intent in intents.split()]
    return {"intent": options, "action": split_concepts(actions), "thing": split_concepts(things)}


def question(names: Names) -> str:
    """Put the parts of a question together: the thing replaces {} in the action or comes last."""
    action = names["action"] if "{}" in names["action"] else names["action"] + " {}"
    return to_sentence(f"{names['intent']} {action.format(names['thing'])}", "?")


def quora_row(rng: Random, tables: ConfigParser) -> Row:
    """Return two questions and whether they are duplicates."""
    difference = rng.choices(list(QUORA_PAIRS), list(QUORA_PAIRS.values()))[0]
    duplicate = difference == ""
    domains = rng.sample(list(tables["questions"]), 2)
    domain, other_domain = (question_domain(tables, name) for name in domains)
    first = choose(rng, domain)
    if difference == "domain":
        second = choose(rng, other_domain)
    else:
        second = dict(first)
        for part in difference.split():
            second[part] = rng.choice([names for names in domain[part] if names != first[part]])
    one, two = choose_names(rng, first, second, rewording=0.65 if duplicate else 0.3)
    label = duplicate != (rng.random() < 0.02)  # noise: the wrong label
    return (question(one), question(two)), str(float(label))


def scene_domain(tables: ConfigParser, name: str) -> Domain:
    """Return the concepts that the scenes of a domain are made from."""
    setting, actions, objects = split(tables["scenes"][name], "/")
    agents = tables["scene parts"]["agents"].replace("/", ";")
    texts = [agents, actions, objects, tables["scene parts"][setting]]
    return dict(zip(STS_WEIGHTS, map(split_concepts, texts), strict=True))


def scene(rng: Random, tables: ConfigParser, names: Names) -> str:
    """Describe a scene in one of three word orders; without a setting it gets an adverb."""
    agent, setting = names["agent"], names["setting"]
    adverb = "" if setting else rng.choice(split(tables["scene parts"]["adverbs"]))
    predicate = f"{adverb} {names['action']} {names['object']}".strip()
    orders = [f"{agent} is {predicate} {setting}"] * 4  # the most common order
    orders.append(f"there is {agent} {predicate} {setting}")
    if setting:
        orders.append(f"{setting}, {agent} is {predicate}")
    return to_sentence(rng.choice(orders))


def sts_row(rng: Random, tables: ConfigParser) -> Row:
    """Return two scenes and their similarity."""
    same_domain = rng.random() >= 0.2  # others have little in common
    domain, other_domain = rng.sample(list(tables["scenes"]), 2)
    first = choose(rng, scene_domain(tables, domain))
    second = choose(rng, scene_domain(tables, domain if same_domain else other_domain))
    for concepts in (first, second):
        if rng.random() < 0.25:  # no setting
            concepts["setting"] = [""]
    if same_domain:
        overlap = rng.choice([0.0, 0.2, 0.5, 0.5, 0.7, 1.0])  # to get the whole range of scores
        second |= {part: first[part] for part in first if rng.random() < overlap}
    # Related are actions and objects of one domain, agents of one group, and a setting and none.
    related = {"action": same_domain, "object": same_domain}
    groups = map(split_concepts, tables["scene parts"]["agents"].split("/"))
    related["agent"] = any(first["agent"] in group and second["agent"] in group for group in groups)
    related["setting"] = [""] in (first["setting"], second["setting"])
    similarity = 0.0
    for part, weight in STS_WEIGHTS.items():
        similarity += 5 * weight * (1 if first[part] == second[part] else 0.3 * related[part])
    one, two = choose_names(rng, first, second, rewording=0.8 if similarity > 3 else 0.3)
    sentences = scene(rng, tables, one), scene(rng, tables, two)
    similarity += rng.choice([-0.4, -0.2, -0.2, 0.0, 0.0, 0.0, 0.2, 0.2, 0.4])  # noise
    return sentences, f"{min(5.0, max(0.0, similarity)):.1f}"


def nli_row(rng: Random, tables: ConfigParser) -> Row:
    """Return a scene, an entailed sentence and a contradicting one; there is no label."""
    kind = rng.choice(list(tables["scenes"]))
    domain = scene_domain(tables, kind)
    concepts = choose(rng, domain)
    one, two = choose_names(rng, concepts, concepts, rewording=0.6)
    two |= rng.choice([{}, {"object": kind}, {"agent": "someone"}])
    if rng.random() < 0.25:  # the agent does nothing
        change = {"action": rng.choice(split(tables["scene parts"]["idle"])), "object": ""}
    else:
        part = rng.choice(["action", "object"])
        other = rng.choice([names for names in domain[part] if names != concepts[part]])
        change = {part: rng.choice(other)}
    return tuple(scene(rng, tables, names) for names in (one, two, one | change)), ""


def new_rows(make_row: Callable[[], Row], size: int, seen: set[tuple[str, ...]]) -> Iterator[Row]:
    """Yield rows that are not in `seen`, and add them to it; no row has one sentence twice."""
    goal = len(seen) + size
    while len(seen) < goal:
        texts, label = make_row()
        # Neither case nor punctuation nor the order of the sentences makes a row new.
        key = tuple(sorted(" ".join(re.findall(r"[a-z0-9']+", text.lower())) for text in texts))
        if key not in seen and len(set(key)) == len(key):
            seen.add(key)
            yield texts, label


def write_csv(path: Path, rows: list[list[str]], delimiter: str) -> None:
    """Write a csv file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)


TASKS = {
    "ids-sst": (sst_row, ["sentence", "sentiment"]),
    "ids-cfimdb": (cfimdb_row, ["sentence", "sentiment"]),
    "quora": (quora_row, ["sentence1", "sentence2", "is_duplicate"]),
    "sts": (sts_row, ["sentence1", "sentence2", "similarity"]),
}


def make_task(out: Path, task: str, seed: int) -> None:
    """Write the train, dev and test files of a task."""
    make_row, columns = TASKS[task]
    rng = Random(f"{task} {seed}")  # no task depends on the others
    seen: set[tuple[str, ...]] = set()  # shared by the files, so that no row is in two of them
    for subset, size in SIZES.items():
        make = partial(make_row, rng, read_tables(train=subset == "train"))
        rows = [["", "id", *columns]]
        for number, (texts, label) in enumerate(new_rows(make, size, seen)):
            rows.append([str(number), f"{rng.getrandbits(100):025x}", *texts, label])
        if subset == "test-student":  # has no labels
            rows = [row[:-1] for row in rows]
        write_csv(out / f"{task}-{subset}.csv", rows, "\t")


def make_nli(out: Path, seed: int) -> None:
    """Write the NLI triples."""
    make = partial(nli_row, Random(f"nli {seed}"), read_tables(train=True))
    triples = [list(texts) for texts, _ in new_rows(make, NLI_SIZE, set())]
    write_csv(out / "nli_for_simcse.csv", [["sent0", "sent1", "hard_neg"], *triples], ",")


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description="Generate the sample data set.")
    folder = Path(__file__).with_name("sample")
    parser.add_argument("--out", type=Path, default=folder, help="output folder")
    parser.add_argument("--seed", type=int, default=11711, help="random seed")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        make_task(args.out, task, args.seed)
    make_nli(args.out, args.seed)


if __name__ == "__main__":
    main()
