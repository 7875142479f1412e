"""Code that was written for the course's own files trains on ours, unchanged.

The client below is written from the interface alone: a `BertModel` whose output is a dict, a
`BertTokenizer` called as HuggingFace's, an `AdamW` over `model.parameters()`, a head of its own.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import BAD, GOOD
from torch import nn

from bert import BertModel
from optimizer import AdamW
from tokenizer import BertTokenizer


class BertSentimentClassifier(nn.Module):
    """A student's classifier."""

    def __init__(self, model: str, option: str, num_labels: int):
        super().__init__()
        self.bert = BertModel.from_pretrained(model)
        for param in self.bert.parameters():
            if option == "pretrain":
                param.requires_grad = False
            elif option == "finetune":
                param.requires_grad = True
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(self.bert.config.hidden_size, num_labels)

    def forward(self, input_ids, attention_mask):
        pooler_output = self.bert(input_ids, attention_mask)["pooler_output"]
        return self.classifier(self.dropout(pooler_output))


class SentimentDataset(torch.utils.data.Dataset):
    """A student's data set, which tokenises each batch."""

    def __init__(self, rows, model):
        self.rows = rows
        self.tokenizer = BertTokenizer.from_pretrained(model)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def collate_fn(self, rows):
        encoding = self.tokenizer(
            [sentence for sentence, _ in rows], return_tensors="pt", padding=True, truncation=True
        )
        return {
            "token_ids": torch.LongTensor(encoding["input_ids"]),
            "attention_mask": torch.LongTensor(encoding["attention_mask"]),
            "labels": torch.LongTensor([label for _, label in rows]),
        }


@pytest.mark.parametrize("option", ["pretrain", "finetune"])
def test_a_classifier_of_the_course_trains(tiny, option):
    """Its loss falls, it learns its rows by heart, and a frozen BERT stays as it was."""
    torch.manual_seed(0)
    words = [*zip(GOOD, GOOD[::-1], strict=True), *zip(BAD, BAD[::-1], strict=True)]
    rows = [(f"{one} {other}", int(one in GOOD)) for one, other in words] * 4
    dataset = SentimentDataset(rows, str(tiny))
    loader = torch.utils.data.DataLoader(
        dataset, shuffle=True, batch_size=8, collate_fn=dataset.collate_fn
    )
    model = BertSentimentClassifier(str(tiny), option, num_labels=2)
    before = {name: p.clone() for name, p in model.bert.named_parameters()}
    everything = dataset.collate_fn(rows)

    @torch.no_grad()
    def evaluate():
        model.eval()
        logits = model(everything["token_ids"], everything["attention_mask"])
        accuracy = (logits.argmax(dim=-1) == everything["labels"]).float().mean().item()
        return F.cross_entropy(logits, everything["labels"]).item(), accuracy

    first_loss, _ = evaluate()
    optimizer = AdamW(model.parameters(), lr=1e-2 if option == "pretrain" else 5e-3)
    for _ in range(40 if option == "pretrain" else 6):
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            logits = model(batch["token_ids"], batch["attention_mask"])
            loss = F.cross_entropy(logits, batch["labels"].view(-1), reduction="sum") / 8
            loss.backward()
            optimizer.step()
    last_loss, accuracy = evaluate()
    assert last_loss < 0.85 * first_loss
    assert accuracy > 0.8
    moved = [name for name, p in model.bert.named_parameters() if not torch.equal(p, before[name])]
    assert moved if option == "finetune" else not moved


def test_states_are_saved_and_loaded_as_the_course_does(tiny, tmp_path):
    """`torch.save` of the model's and the optimizer's `state_dict`, and back."""
    model = BertSentimentClassifier(str(tiny), "finetune", num_labels=2)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    dataset = SentimentDataset([("the film is great", 1), ("the plot is dull", 0)], str(tiny))
    batch = dataset.collate_fn(dataset.rows)

    def step(model, optimizer):
        model.eval()
        F.cross_entropy(
            model(batch["token_ids"], batch["attention_mask"]), batch["labels"]
        ).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer)
    torch.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, tmp_path / "save.pt")
    other = BertSentimentClassifier(str(tiny), "finetune", num_labels=2)
    other_optimizer = AdamW(other.parameters(), lr=1e-3)
    saved = torch.load(tmp_path / "save.pt")
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optim"])
    step(model, optimizer)
    step(other, other_optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
