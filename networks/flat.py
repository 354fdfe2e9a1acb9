"""A network as a function of a vector of its parameters, as trajectory matching needs it."""
import torch


class FlatNetwork:
    """`flat(vector, clips)` returns the logits of `net` with the parameters `vector` (P,), as in `net.parameters()`."""

    def __init__(self, net):
        self.net = net.requires_grad_(False)
        self.shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]

    def __call__(self, vector, clips):
        pieces = zip(self.shapes.items(), vector.split(self.sizes))
        weights = {name: piece.view(shape) for (name, shape), piece in pieces}
        return torch.func.functional_call(self.net, weights, (clips,))
