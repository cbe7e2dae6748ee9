"""
The removal schedule: what happens at which step. Rows of numbers to events, the state at a step, carrying events out,
and the learning rate.

    ln_schedule = [                      # sites, first step, steps between layers
        ("ln_2", 10, 5),                 # layer 0 before step 10, layer 1 before step 15, ..., up to the last
        ("ln_1qk", 40, 0),               # all layers before step 40
        ("h.4.ln_1v", 50, None),         # a single site
        *[(f"h.{i}.ln_1v", 60 + i, None) for i in (3, 2, 1, 0)],    # any other order, in Python
        ("ln_f", 90, None),
        ("eot", 95, None),               # this treatment is off from step 95; one without a row is never on
        ("bos", 99, None),
    ]                                    # for a model of 5 layers

For a model of any depth and a run of any length, a row can say where in the run it begins, as a fraction of max_iters:
("ln_f", 0.4, None). A pair spreads the layers evenly from its first number up to, but not including, its second:
("ln_2", (0.1, 0.3), None).
"""
import math
from statistics import median

import torch

from model import KINDS
from parts.errors import UserError

TREATMENTS = ("eot", "bos")
LOOK_AHEAD = 20  # steps whose batches are tried, if the event's own has no ordinary token
LONG = 20  # steps
FAR = 0.5  # nats


def timeline(ln_schedule, n_layer, max_iters):
    """The removal events [(step, kind, layer or None), ...] in the order they happen. UserError on a schedule that
    can't run."""
    events = [event for row in ln_schedule for event in row_events(row, n_layer, max_iters)]
    events.sort(key=lambda event: event[0])  # stable: events of one step keep the schedule's order
    names = [site_name(kind, layer) for _, kind, layer in events]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"ln_schedule: {name} has two events")
    if events and events[-1][0] >= max_iters:
        raise UserError(f"ln_schedule: {names[-1]} at step {events[-1][0]} never happens: max_iters is {max_iters}. "
                        "Raise it, or give the rows as fractions of it")
    return events


def row_events(row, n_layer, max_iters):
    """One row's events [(step, kind, layer or None), ...]. UserError if it is not a row."""
    if not isinstance(row, (list, tuple)) or len(row) != 3:
        raise UserError(f"ln_schedule: {row!r} is not a row (sites, first step, steps between layers)")
    name, first, gap = row
    if name in KINDS:
        sites = [(name, layer) for layer in range(n_layer)]
    elif name in ("ln_f", *TREATMENTS):
        sites = [(name, None)]
    else:
        named = {site_name(kind, layer): (kind, layer) for kind in KINDS for layer in range(n_layer)}
        if not isinstance(name, str) or name not in named:
            raise UserError(f"ln_schedule: unknown site {name!r}: choose one of {', '.join(KINDS)}, ln_f, eot, bos, "
                            f"or a single site, from h.0.ln_2 to h.{n_layer - 1}.ln_2")
        sites = [named[name]]

    if isinstance(first, (list, tuple)) and len(first) == 2 and name in KINDS and gap is None:
        begin, end = (step_of(row, at, max_iters) for at in first)
        if type(first[0]) is not type(first[1]) or end < begin:
            raise UserError(f"ln_schedule: {row!r} needs two steps, or two fractions of max_iters, in ascending order")
        steps = [begin + (end - begin) * i // len(sites) for i in range(len(sites))]
    elif name in KINDS:
        if type(gap) is not int or gap < 0:
            raise UserError(f"ln_schedule: the third column of {row!r}, the steps between layers, must be 0 or more")
        steps = [step_of(row, first, max_iters) + gap * i for i in range(len(sites))]
    else:
        if gap is not None:
            raise UserError(f"ln_schedule: {name} is a single event: the third column of {row!r} must be None")
        steps = [step_of(row, first, max_iters)]
    return [(step, kind, layer) for step, (kind, layer) in zip(steps, sites)]


def step_of(row, at, max_iters):
    """A step, or a fraction of max_iters -> the step."""
    if type(at) is float and 0 <= at <= 1:
        return round(at * max_iters)
    if type(at) is not int or at < 0:
        raise UserError(f"ln_schedule: {row!r} must begin at a step from 0, or at a fraction of max_iters from 0.0 to "
                        "1.0")
    return at


def site_name(kind, layer):
    return kind if layer is None else f"h.{layer}.{kind}"


def state_at(events, step, sites):
    """({site: mode}, {treatment: on}) after the events of all steps before `step`: a pure function of the schedule, so
    that a resumed run finds the same model."""
    past = {site_name(kind, layer) for at, kind, layer in events if at < step}
    scheduled = {kind for _, kind, _ in events}
    modes = {name: "fake" if name in past else "real" for name in sites}
    treatments = {name: name in scheduled and name not in past for name in TREATMENTS}
    return modes, treatments


def check_modes(model, events, step):
    """UserError unless the sites of a model that begins at `step` have the schedule's modes there."""
    if model.config.folded:
        raise UserError("init_from is a folded model: it has no LayerNorm that ln_schedule could remove")
    modes, _ = state_at(events, step, model.sites())
    for name, mode in model.ln_modes().items():
        if mode != modes[name]:
            raise UserError(f"{name} is {mode} at step {step}, but ln_schedule has it {modes[name]} there")


def set_treatments(model, events, step):
    """Switch on the treatments that the schedule ends at `step` or later, and the others off."""
    _, treatments = state_at(events, step, model.sites())
    for kind, on in treatments.items():
        model.set_treatment(kind, on)


def remove(model, events, step, batches, mean, over, momentum):
    """Carry out a step's events on the raw model, before its forward pass. Before a site is removed, measure the
    constants of all sites that are still real. Returns a log entry for each event.

    batches(step): the step's micro-batches idx (B, T); mean averages a tensor over ranks; over and momentum are
    train.py's std_over and std_momentum: with a momentum, the constants are measured at each step up to the last
    removal. UserError if no step ahead has an ordinary token."""
    due = [(kind, layer) for at, kind, layer in events if at == step]
    site_steps = [at for at, kind, _ in events if kind not in TREATMENTS]
    if step in site_steps or (momentum > 0 and step < max(site_steps, default=0)):
        momentum = momentum if step > 0 else 0.0
        for measured_at in range(step, step + LOOK_AHEAD):
            if measure(model, batches(measured_at), mean, over, momentum):
                break
        else:
            raise UserError(f"steps {step} to {measured_at} have no token after position 0 that is not end-of-text: "
                            "there is nothing to measure the constants on")
    entries = []
    for kind, layer in due:
        name = site_name(kind, layer)
        if kind in TREATMENTS:
            model.set_treatment(kind, False)
            entries.append(dict(step=step, event=name, treatment="off"))
        else:
            model.set_ln_mode(kind, layer, "fake")
            site = model.sites()[name]
            entry = dict(step=step, event=name, mode="fake", avg_std=site.avg_std.item(), bos_std=site.bos_std.item())
            entries.append(entry if measured_at == step else entry | dict(measured_at=measured_at))
    return entries


@torch.no_grad()
def measure(model, batches, mean, over, momentum):
    """Set the constants of all sites that are still real, in one pass. A constant must fit the weights of this moment
    and the tokens that come next, so it is measured at the event, on the step's own batch; sites that are removed
    later are measured again then. Returns False, and sets nothing, if the batch has no ordinary token."""
    model.eval()  # without dropout
    totals = {}  # over micro-batches, so that each token counts the same
    for idx in batches:
        for name, found in model.observe_std(idx, over).items():
            totals[name] = totals.get(name, 0) + found
    model.train()
    for name, total in totals.items():
        sums, counts = mean(total).T
        if not counts[0]:
            return False
        site = model.sites()[name]
        before = torch.stack([site.avg_std, site.bos_std])
        model.set_std({name: before * momentum + sums / counts * (1 - momentum)})
    return True


def still_far_up(losses, events, step):
    """A note if the loss, LONG steps after an event, is still FAR above its value before; else "". Normally it
    recovers within a step or two. losses: {step: loss}."""
    names = [site_name(kind, layer) for at, kind, layer in events if at == step - LONG]
    before = [losses[k] for k in range(step - 2 * LONG, step - LONG) if k in losses]
    now = [losses[k] for k in range(step - LONG // 2, step + 1) if k in losses]
    if not names or not before:
        return ""
    up = median(now) - median(before)
    if not up > FAR:
        return ""
    return (f"note: {LONG} steps after the event of {names[-1]}, the loss is still {up:.2f} nats above its value "
            "before: a lower learning_rate, or more steps between events, may help")


def describe(ln_schedule, events):
    """A line for each kind, treatment and named site of the schedule: what happens before which steps."""
    lines = []
    names = list(dict.fromkeys(row[0] for row in ln_schedule))
    for name in names:
        steps = [str(step) for step, kind, layer in events if name in (kind, site_name(kind, layer))]
        layers = f" in all {len(steps)} layers" if len(steps) > len(set(steps)) == 1 else ""
        steps = steps[0] if layers else ", ".join(steps)
        lines.append(f"  {name:<6} {'off' if name in TREATMENTS else 'fake'}{layers} before step {steps}")
    return lines


def describe_event(entry):
    """A log entry of remove -> "h.0.ln_2 fake, std 0.2205, at position 0 0.2928"."""
    if "treatment" in entry:
        return f"{entry['event']} treatment off"
    line = f"{entry['event']} fake, std {entry['avg_std']:.4f}, at position 0 {entry['bos_std']:.4f}"
    if "measured_at" in entry:
        line += f", of step {entry['measured_at']}'s tokens, as its own are all end-of-text"
    return line


def learning_rate_at(step, learning_rate, min_lr, warmup_iters, lr_decay_iters):
    """Linear warm-up, then a cosine to min_lr at step lr_decay_iters, counted from 0 with the warm-up. Source:
    nanoGPT, train.py."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    done = min(1.0, (step - warmup_iters) / max(1, lr_decay_iters - warmup_iters))
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (learning_rate - min_lr)
