"""Rollback of optimizer steps that make the loss non-finite.

Exploding losses are the problem that users of trajectory matching report most often.
"""
import copy

import torch

from utils import finite


class LastGood:
    """Keeps the state before an optimizer's last step, and rolls the step back if the loss after it is not finite.

    ValueError after `patience` rollbacks in a row: the learning rate is too high.
    """

    def __init__(self, optimizer, patience=20):
        self.optimizer, self.patience = optimizer, patience
        self.kept, self.in_a_row = None, 0
        self.learned = [value for group in optimizer.param_groups for value in group["params"] if value.requires_grad]

    def step(self, loss):
        """Take an optimizer step with the current gradients; return True if it was taken.

        If `loss`, the gradients or the updated values are not finite, roll the last step back and return False.
        """
        if finite([loss]) and finite(value.grad for value in self.learned):
            if self.kept:  # the last step was not rolled back
                self.in_a_row = 0
            self.kept = None  # free it first: two copies are larger than the set
            self.kept = {"learned": [value.detach().clone() for value in self.learned],
                         "optimizer": copy.deepcopy(self.optimizer.state_dict())}
            self.optimizer.step()
            if finite(self.learned):
                return True
        self.roll_back(loss)
        return False

    def roll_back(self, loss):
        self.in_a_row += 1
        if self.in_a_row >= self.patience:
            raise ValueError(f"{self.in_a_row} steps in a row were rolled back, the last loss is {loss.item()}: lower "
                             "the learning rates")
        if self.kept:
            with torch.no_grad():
                for value, kept in zip(self.learned, self.kept["learned"]):
                    value.copy_(kept)
            self.optimizer.load_state_dict(self.kept["optimizer"])
            self.kept = None

    def state_dict(self):
        return {"kept": self.kept, "in_a_row": self.in_a_row}

    def load_state_dict(self, state):
        self.kept, self.in_a_row = state["kept"], state["in_a_row"]

