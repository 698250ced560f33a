"""The exact loss in the simplest way: a forward pass of a transformers model per sentence, padded to one length."""

import torch


class SentenceBySentence:
    """-sum_w P(w | x_-t) log f(x_-t)[w] of every position of a sentence, nats.

    Args:
        model: a masked language model of transformers, in eval mode.
        ids: vocabulary id of each word and special token.
        words: of the columns of the conditionals.
        max_length: tokens that every sentence is padded to; None for no padding.
    """

    def __init__(self, model, ids: dict[str, int], words: list[str], max_length: int | None):
        self.model = model
        self.ids = ids
        self.max_length = max_length
        self.columns = torch.tensor([ids[word] for word in words])

    @torch.no_grad()
    def losses(self, text: str, conditionals) -> list[float]:
        """One number per position; `conditionals` are (positions, words)."""
        tokens = [self.ids[word] for word in ("[CLS]", *text.split(), "[SEP]")]
        length = self.max_length or len(tokens)
        positions = torch.arange(len(tokens) - 2)
        padded = torch.tensor(tokens + [self.ids["[PAD]"]] * (length - len(tokens)))
        inputs = padded.repeat(len(positions), 1)  # (positions, length)
        inputs[positions, positions + 1] = self.ids["[MASK]"]
        mask = (torch.arange(length) < len(tokens)).long().expand(len(positions), -1)
        logits = self.model(input_ids=inputs, attention_mask=mask).logits  # (positions, length, vocabulary)
        log_f = logits[positions, positions + 1].double().log_softmax(-1)
        return (-(torch.from_numpy(conditionals) * log_f[:, self.columns]).sum(-1)).tolist()
