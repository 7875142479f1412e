"""A student's solutions, written from the docstrings of the handout, and mistakes students make."""

import re
from collections.abc import Mapping
from textwrap import dedent, indent
from types import MappingProxyType

SOLUTIONS = {  # file -> function -> what replaces its NotImplementedError, in the order of the file
    "bert.py": {
        "eager_attention": """
            scores = torch.matmul(query, key.transpose(2, 3))
            scores = scores * query.shape[-1] ** -0.5
            scores = scores + mask
            weights = torch.softmax(scores, dim=3)
            weights = dropout(weights)
            return torch.matmul(weights, value)
        """,
        "add_norm": """
            output = dropout(dense_layer(output))
            return ln_layer(input + output)
        """,
        "BertLayer.forward": """
            x = self.self_attention(hidden_states, attention_mask)
            dense, norm = self.attention_dense, self.attention_layer_norm
            x = self.add_norm(hidden_states, x, dense, self.attention_dropout, norm)
            y = self.interm_dense(x)
            y = self.interm_af(y)
            return self.add_norm(x, y, self.out_dense, self.out_dropout, self.out_layer_norm)
        """,
        "embed": """
            words = self.word_embedding(input_ids)
            positions = self.pos_embedding(self.position_ids[:, : input_ids.shape[1]])
            segments = self.tk_type_embedding(token_type_ids)
            x = words + positions + segments
            x = self.embed_layer_norm(x)
            return self.embed_dropout(x)
        """,
    },
    "optimizer.py": {
        "adamw_update": """
            beta1, beta2 = group["betas"]
            lr, wd = group["lr"], group["weight_decay"]
            m.copy_(beta1 * m + (1 - beta1) * grad)
            v.copy_(beta2 * v + (1 - beta2) * grad**2)
            alpha = lr
            if group["correct_bias"]:
                alpha = lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
            p.copy_(p - alpha * m / (v**0.5 + group["eps"]))
            p.copy_(p - lr * wd * p)
        """,
    },
    "tasks.py": {
        "Classification.loss": """
            log_p = torch.log_softmax(logits, dim=-1)
            return -log_p[torch.arange(len(labels)), labels]
        """,
    },
    "model.py": {
        "LinearHead.forward": """
            u = self.dropout(u)
            return u @ self.dense.weight.T + self.dense.bias
        """,
        "predict_sentiment": """
            pooled = self.embed(input_ids, attention_mask)
            return self.decode("sst", pooled)
        """,
        "predict_paraphrase": """
            u, v = self.embed(ids_1, mask_1), self.embed(ids_2, mask_2)
            return self.decode("para", torch.cat([u, v]))
        """,
        "predict_similarity": """
            u, v = self.embed(ids_1, mask_1), self.embed(ids_2, mask_2)
            return self.heads["sts"](u, v)
        """,
    },
    "multitask_classifier.py": {
        "row_losses": """
            embeddings = embed(batch)
            if detach:
                embeddings = embeddings.detach()
            logits = model.decode(batch.task, embeddings)
            return logits, labels.loss(logits, batch.labels)
        """,
    },
    "simcse.py": {
        "contrastive_loss": """
            everyone = positives
            if negatives is not None:
                everyone = torch.cat([positives, negatives])
            cosines = F.cosine_similarity(anchors.unsqueeze(1), everyone.unsqueeze(0), dim=-1)
            e = torch.exp(cosines / temperature)
            own = torch.diagonal(e)
            keep = torch.ones_like(e)
            if excluded is not None:
                keep = (~excluded).float()
                keep.fill_diagonal_(1.0)
            if negatives is not None:
                n = len(anchors)
                keep[range(n), range(n, 2 * n)] *= hard_negative_weight
            return -torch.log(own / (e * keep).sum(dim=1))
        """,
    },
}
TESTS = {  # function -> its tests in grade.py
    "eager_attention": {"attention", "attention with padding"},
    "add_norm": {"add_norm"},
    "BertLayer.forward": {"encoder layer"},
    "embed": {"embeddings"},
    "adamw_update": {"AdamW", "AdamW with weight decay"},
    "Classification.loss": {"sentiment loss"},
    "LinearHead.forward": {"sentiment head"},
    "predict_sentiment": {"predict_sentiment"},
    "predict_paraphrase": {"predict_paraphrase"},
    "predict_similarity": {"predict_similarity"},
    "row_losses": {"multitask step", "multitask step with detach"},
    "contrastive_loss": {"contrastive loss", "contrastive loss with hard negatives"},
}
MISTAKES = [  # function, right, wrong, the test that fails, a part of its sentence
    ("eager_attention", " * query.shape[-1] ** -0.5", "", "attention", "sqrt(head size)"),
    ("eager_attention", "weights = dropout(weights)", "", "attention", "does not apply dropout"),
    ("eager_attention", "scores + mask", "scores", "attention with padding", "row 2 changes"),
    (
        "eager_attention",
        "scores = scores + mask\nweights = torch.softmax(scores, dim=3)",
        "weights = torch.softmax(scores, dim=3) + mask",
        *("attention with padding", "adds the mask after the softmax"),
    ),
    ("add_norm", "input + output", "output", "add_norm", "lacks the residual connection"),
    ("add_norm", "ln_layer(input + output)", "input + ln_layer(output)", "add_norm", "normalizes"),
    ("add_norm", "dropout(dense_layer(output))", "dense_layer(output)", "add_norm", "not apply"),
    (
        "add_norm",
        "output = dropout(dense_layer(output))\nreturn ln_layer(input + output)",
        "return dropout(ln_layer(input + dense_layer(output)))",
        *("add_norm", "dropout in the wrong place"),
    ),
    (
        "BertLayer.forward",
        "(x, y, ",
        "(hidden_states, y, ",
        "encoder layer",
        "starts from the layer",
    ),
    ("BertLayer.forward", "y = self.interm_af(y)", "", "encoder layer", "lacks the activation"),
    (
        "BertLayer.forward",
        "self.out_dropout",
        "self.attention_dropout",
        "encoder layer",
        "modules of",
    ),
    ("embed", "words + positions", "words", "embeddings", "lacks the position embeddings"),
    ("embed", " + segments", "", "embeddings", "lacks the segment embeddings"),
    ("embed", "x = self.embed_layer_norm(x)", "", "embeddings", "lacks embed_layer_norm"),
    ("embed", "self.embed_dropout(x)", "x", "embeddings", "does not apply embed_dropout"),
    (
        "adamw_update",
        'if group["correct_bias"]:',
        "if False:",
        "AdamW",
        "does not correct the bias",
    ),
    (
        "adamw_update",
        'alpha * m / (v**0.5 + group["eps"])',
        'lr * m / (1 - beta1**t) / ((v / (1 - beta2**t)) ** 0.5 + group["eps"])',
        "AdamW",
        "adds eps to the corrected root",
    ),
    (
        "adamw_update",
        "beta2**t) ** 0.5 / (1 - beta1**t)",
        "beta2 ** (t - 1)) ** 0.5 / (1 - beta1 ** (t - 1))",
        "AdamW",
        "t - 1 for t",
    ),
    (
        "adamw_update",
        "beta2**t) ** 0.5 / (1 - beta1**t)",
        "beta2 ** (t + 1)) ** 0.5 / (1 - beta1 ** (t + 1))",
        "AdamW",
        "t + 1 for t",
    ),
    ("adamw_update", "p.copy_(p - lr * wd * p)", "", "AdamW with weight decay", "does not decay"),
    ("adamw_update", "p - lr * wd * p", "p - wd * p", "AdamW with weight decay", "learning rate"),
    (
        "adamw_update",
        "m.copy_",
        "grad, wd = grad + wd * p, 0\nm.copy_",
        *("AdamW with weight decay", "adds the weight decay to the gradient"),
    ),
    (
        "adamw_update",
        "m.copy_",
        "p.copy_(p - lr * wd * p)\nwd = 0\nm.copy_",
        *("AdamW with weight decay", "decays before the update"),
    ),
    (
        "LinearHead.forward",
        "self.dropout(u)",
        "F.dropout(u, self.dropout.p)",
        "sentiment head",
        "applies dropout at evaluation",
    ),
    ("LinearHead.forward", "u = self.dropout(u)", "", "sentiment head", "not apply dropout in"),
    (
        "LinearHead.forward",
        "return u @ self.dense.weight.T + self.dense.bias",
        "return self.dense(u).softmax(dim=-1)",
        "sentiment head",
        "returns probabilities",
    ),
    (
        "Classification.loss",
        "logits, dim",
        "logits.softmax(-1), dim",
        "sentiment loss",
        "applies softmax",
    ),
    ("Classification.loss", "labels]", "labels].mean()", "sentiment loss", "a single number"),
    (
        "predict_sentiment",
        "pooled)",
        "pooled).softmax(dim=-1)",
        "predict_sentiment",
        "returns probabilities",
    ),
    ("predict_paraphrase", '"para"', '"sts"', "predict_paraphrase", "uses the head of sts"),
    (
        "predict_paraphrase",
        "[u, v])",
        "[u, v])).sigmoid(",
        "predict_paraphrase",
        "returns a probability",
    ),
    ("predict_paraphrase", "[u, v]", "[v, u]", "predict_paraphrase", "swaps"),
    ("predict_similarity", '"sts"', '"para"', "predict_similarity", "uses the head of para"),
    (
        "predict_similarity",
        "(u, v)",
        "(u, v).sigmoid() * 5",
        "predict_similarity",
        "applies a sigmoid",
    ),
    (
        "row_losses",
        "batch.labels)",
        "batch.labels.int().float())",
        "multitask step",
        "casts the labels to int",
    ),
    ("row_losses", "batch.task", '"para"', "multitask step", "head of another task"),
    ("row_losses", "if detach", "if False", "multitask step with detach", "ignores detach"),
    ("row_losses", "if detach", "if True", "multitask step with detach", "does not reach BERT"),
    ("contrastive_loss", " / temperature", "", "contrastive loss", "divide by the temperature"),
    (
        "contrastive_loss",
        "F.cosine_similarity(anchors.unsqueeze(1), everyone.unsqueeze(0), dim=-1)",
        "anchors @ everyone.T",
        "contrastive loss",
        "takes dot products",
    ),
    (
        "contrastive_loss",
        "hard_negative_weight",
        "1.0",
        "contrastive loss with hard negatives",
        "ignores hard_negative_weight",
    ),
    (
        "contrastive_loss",
        "if excluded is not None",
        "if False",
        "contrastive loss with hard negatives",
        "ignores `excluded`",
    ),
    (
        "contrastive_loss",
        "keep.fill_diagonal_(1.0)",
        "",
        "contrastive loss with hard negatives",
        "a row's own positive",
    ),
    (
        "adamw_update",
        "m.copy_(beta1 * m + (1 - beta1) * grad)",
        "m = beta1 * m + (1 - beta1) * grad",
        "AdamW",
        "first moment m, in place",
    ),
]


HOLE = re.compile(r'^( *)raise NotImplementedError\((".*"|\n.*\n *)\)\n', re.MULTILINE)


def solve(text: str, file: str, blank: str = "", edits: Mapping = MappingProxyType({})) -> str:
    """The handout's file with the solutions, but for one function; edits: function -> old, new."""
    functions = iter(SOLUTIONS[file].items())

    def fill(hole: re.Match) -> str:
        name, code = next(functions)
        if name == blank:
            return hole[0]
        code = dedent(code).strip() + "\n"
        if name in edits:
            assert edits[name][0] in code
            code = code.replace(*edits[name], 1)
        return indent(code, hole[1])

    solved = HOLE.sub(fill, text)
    assert not list(functions), f"{file}: fewer exercises than solutions"
    return solved
