"""Masked conditionals of a restricted causal model written the simplest way: one forward pass of the sentence per candidate."""

import math

import torch


class SubstituteEachWord:
    """P(x_t = w | x_-t) by the joint probability of the sentence with w at t.

    Args:
        model: transformers' causal model.
        kept: ids of the kept tokens; start, end: ids of the start and the end token.
        limit: maximum number of tokens per sentence.
    """

    def __init__(self, model, kept: list[int], start: int, end: int, limit: int):
        self.model = model
        self.start = start
        self.end = end
        self.limit = limit
        self.kept = kept
        self.columns = torch.tensor([*kept, end])

    @torch.no_grad()
    def log_joint(self, sentence: list[int]) -> float:
        """Nats; the sentence as columns."""
        ids = [self.kept[column] for column in sentence]
        logits = self.model(input_ids=torch.tensor([[self.start, *ids]])).logits[0, :, self.columns].double()
        logits[0, -1] = -math.inf  # no sentence is empty
        log_p = logits.log_softmax(-1)
        total = sum(float(log_p[place, column]) for place, column in enumerate(sentence))
        return total + (float(log_p[len(sentence), -1]) if len(sentence) < self.limit else 0.0)

    def conditional(self, sentence: list[int], place: int, candidates=None) -> list[float]:
        """P of the candidates, all columns for None, among themselves."""
        candidates = range(len(self.kept)) if candidates is None else candidates
        joints = [self.log_joint([*sentence[:place], column, *sentence[place + 1 :]]) for column in candidates]
        largest = max(joints)
        weights = [math.exp(joint - largest) for joint in joints]
        return [weight / sum(weights) for weight in weights]
