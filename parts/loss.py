"""
Losses without whole logits. GPT-2 has 50,257 logits a token, far more than the activations that they are made of, so
a piece of the tokens is unembedded at a time. In training each piece gives its loss and its gradient, and its logits
are freed before the next piece is made (the idea of Liger Kernel, arXiv 2410.10989).
"""
import torch
from torch.nn import functional as F

from model import at_least_float32

LOSS_ROWS = 1024  # tokens in a piece, in training
EVAL_ROWS = 128  # in evaluation, in float32: glibc maps blocks above 32 MB anew each time
GPU_FACTOR = 8  # larger pieces on a GPU: each one costs kernel launches and a gradient of the unembedding's size


def piece_rows(x, rows):
    """Rows of x in a piece."""
    return GPU_FACTOR * rows if x.is_cuda else rows


def pieces(x, rows):
    """x (N, ...) -> tensors of piece_rows(x, rows) rows each, the last one may have fewer."""
    return x.split(piece_rows(x, rows))


# --- training


class LossInPieces:
    """A loss of logits, computed piece by piece; autograd (torch.func) finds each piece's gradient.

    of_logits(logits, targets, teacher_logits) -> (sum over rows of the loss, {name: sum over rows of a term}), where
    logits and teacher_logits, or None, are (rows, vocab) in float32, and targets (rows,); targets of -1 must not count.
    head and teacher_head, or None, are the unembeddings of model and teacher."""

    def __init__(self, of_logits, head, teacher_head=None, compiled=False):
        self.head, self.teacher_head = head, teacher_head
        vocab_size = head.out_features

        def of_piece(x, W, b, targets, x_teacher, W_teacher):
            logits = at_least_float32(F.linear(x, padded(W), padded(b))[:, :vocab_size])
            teacher_logits = None
            if x_teacher is not None:
                teacher_logits = at_least_float32(F.linear(x_teacher, padded(W_teacher))[:, :vocab_size])
            return of_logits(logits, targets, teacher_logits)

        by = (0, 1) if head.bias is None else (0, 1, 2)
        gradients = torch.func.grad_and_value(of_piece, argnums=by, has_aux=True)
        self.value = torch.compile(of_piece) if compiled else of_piece
        self.gradients_and_value = torch.compile(gradients) if compiled else gradients

    def __call__(self, hidden, targets, teacher_hidden=None):
        """What the unembeddings read, hidden and teacher_hidden or None (B, T, C), and targets (B, T) -> the mean of
        the loss, a scalar with gradient, and {name: mean of the term, without gradient}, over targets that are not -1.
        Matrix products are in autocast's dtype."""
        if teacher_hidden is not None:
            teacher_hidden = teacher_hidden.flatten(0, 1)
        names = []  # the terms' names: an autograd.Function returns tensors only
        loss, *means = InPieces.apply(self, names, torch.is_grad_enabled(), targets.flatten(), teacher_hidden,
                                      hidden.flatten(0, 1), self.head.weight, self.head.bias)
        return loss, dict(zip(names, means))


class InPieces(torch.autograd.Function):
    """LossInPieces.__call__, with x (N, C), targets (N,) and x_teacher (N, C) or None."""

    @staticmethod
    def forward(ctx, in_pieces, names, with_gradient, targets, x_teacher, x, W, b):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        weights = [prepared(t, dtype) for t in (W, b)]  # once a micro-batch
        W_teacher = None if x_teacher is None else prepared(in_pieces.teacher_head.weight, dtype)
        loss, sums, grad_x, grads = 0, {}, [], []
        rows = piece_rows(x, LOSS_ROWS)
        for i in range(0, len(x), rows):
            piece = slice(i, i + rows)
            teacher_piece = None if x_teacher is None else x_teacher[piece].to(dtype)
            args = x[piece].to(dtype), *weights, targets[piece], teacher_piece, W_teacher
            if with_gradient:
                (by_x, *by_weights), (piece_loss, terms) = in_pieces.gradients_and_value(*args)
                by_weights = [by.to(W.dtype) for by in by_weights]
                grad_x.append(by_x.to(x.dtype))
                grads = [grad.add_(by) for grad, by in zip(grads, by_weights)] if grads else by_weights
            else:
                piece_loss, terms = in_pieces.value(*args)
            loss = loss + piece_loss
            sums = {name: sums.get(name, 0) + term for name, term in terms.items()}
        n = (targets != -1).sum()
        if with_gradient:
            grads = [torch.cat(grad_x), *grads, None][:3]  # None: there is no bias
            ctx.save_for_backward(*(None if grad is None else grad.div_(n) for grad in grads))
        names.extend(sums)
        means = [term / n for term in sums.values()]
        ctx.mark_non_differentiable(*means)
        return loss / n, *means

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_loss, *_):
        grads = (None if grad is None else grad.mul_(by_loss) for grad in ctx.saved_tensors)  # in place: once only
        return *[None] * 5, *grads


def prepared(W, dtype):
    """An unembedding W (V, C), or its bias (V,), in dtype. In a lower dtype its mean over V is taken off
    first: the same softmax from far smaller logits. GPT-2's lie near -100, where bfloat16 steps by 0.5, a noise in KL
    as large as KL. The gradient by W stays the same, as the gradient by a row's logits sums to zero."""
    return W if W is None or W.dtype == dtype else (W - W.mean(0)).to(dtype)


def padded(W):
    """W (V, ...) or None, with rows of zeros up to a multiple of 64, which is faster than 50,257. The copy lives for
    one piece only."""
    return W if W is None else F.pad(W, (0, 0) * (W.dim() - 1) + (0, -len(W) % 64))


# --- evaluation


def exact_logits(model, x):
    """x (..., C), what the unembedding reads -> logits (..., vocab) in float32, under autocast too. GPT-2's logits lie
    far from zero, where bfloat16's steps are wider than the differences that an evaluation measures."""
    bias = None if model.lm_head.bias is None else model.lm_head.bias.float()
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), model.lm_head.weight.float(), bias)


def token_losses(model, x, targets):
    """x (N, C), targets (N,) -> each token's loss in nats (N,), float32."""
    losses = []
    for x_piece, targets_piece in zip(pieces(x, EVAL_ROWS), pieces(targets, EVAL_ROWS)):
        losses.append(F.cross_entropy(exact_logits(model, x_piece), targets_piece, reduction="none"))
    return torch.cat(losses)
