"""A trained model as programs of ``torch.export``, which run without this library and can be compiled further.

    save_exported(Path("exported"), model)
    model = load_exported(Path("exported"))       # generates and scores like the model itself

A folder holds ``scoring.pt2``, the decoding step as ``start.pt2`` and ``step_0.pt2``, ``step_1.pt2``, ..., and
``programs.json`` with the sizes. With torch alone, a sequence is read like this:

    start, *steps = (torch.export.load(f"exported/{name}.pt2").module() for name in ("start", "step_0", "step_1"))
    state = start(ids_BT[:, 0])
    for position in range(ids_BT.shape[1]):
        logits_BV, state = steps[position % len(steps)](ids_BT[:, position], position, state)

There is one program of the step for each position modulo the product of all strides, because which levels work differs
between them: each holds exactly the work of its positions. The state is a dictionary of tensors [B, ...]; keys and
values of attention are written into those that are handed in, so a state is used once. Programs work for any batch and
stay on the device and in the precision of the model.

A file holds a program and its weights; torch reads parts of it with pickle, so load only what you trust, and only with
about the version of torch that wrote it.

Shape suffixes: B sequences, T positions, C channels, V token ids.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from deconv_model.blocks import DecodingState
from deconv_model.config import require
from deconv_model.language_model import LanguageModel
from deconv_model.softmax import capped_logits

SIZES_FILE = "programs.json"
_FORMAT = 1
_VOCABULARY_CHUNK = 4096  # ids whose logits the scoring holds at once
_BATCH = 2  # of the examples: torch takes a batch of 1 for a constant
_BATCH_DIM = {0: Dim.DYNAMIC}


class StepPrograms(NamedTuple):
    """The decoding step of a model.

    Attributes:
        start: From the first ids [B], of which only the number counts, to the state before them.
        steps: That of ``position`` is ``steps[position % len(steps)]``: from the ids [B] there, ``position`` (an int)
            and the state to the logits [B, V] of the next token and the state after it.
    """

    start: ExportedProgram
    steps: tuple[ExportedProgram, ...]


def export_scoring(model: LanguageModel) -> ExportedProgram:
    """Export :meth:`~deconv_model.language_model.LanguageModel.token_losses` for sequences of a whole context.

    Args:
        model: Exported in evaluation mode; it is left as it is.

    Returns:
        A program from ids and targets, both int64 [B, ``context_length``], to ``-log p(targets)`` in nats, [B, T]. A
        shorter sequence may be padded behind its end with any id: nothing before can see it.
    """
    ids_BT = torch.zeros(_BATCH, model.config.context_length, dtype=torch.int64, device=model.embedding.device)
    targets_BT = torch.zeros_like(ids_BT)  # torch takes the same tensor for the same input
    return _export(_Scoring(_frozen(model)), (ids_BT, targets_BT), (_BATCH_DIM, _BATCH_DIM))


def export_step(model: LanguageModel) -> StepPrograms:
    """Export :meth:`~deconv_model.language_model.LanguageModel.step`, with the state as explicit inputs and outputs.

    Args:
        model: Exported in evaluation mode; it is left as it is. The programs share its weights' one copy.

    Raises:
        ValueError: The context is shorter than three times the product of all strides.
    """
    config = model.config
    stride = config.total_stride
    require(
        config.context_length >= 3 * stride,  # torch takes the first two blocks of positions for constants
        f"context_length must be at least 3 x the product of strides ({3 * stride}) to export the step, "
        f"got {config.context_length}",
    )
    frozen = _frozen(model)
    names = {module: name for name, module in frozen.named_modules()}
    positions, examples = _first_block(frozen)
    keys = {f"{names[part]}.{name}": (part, name) for part, name in examples[0]}
    ids_B = torch.zeros(_BATCH, dtype=torch.int64, device=frozen.embedding.device)
    start = _export(_Start({name: examples[0][key] for name, key in keys.items()}), (ids_B,), (_BATCH_DIM,))
    shapes = (_BATCH_DIM, Dim.DYNAMIC, dict.fromkeys(keys, _BATCH_DIM))
    steps = []
    for phase in range(stride):
        step = _Step(frozen, phase, positions[phase], positions[stride], keys)
        position = 2 * stride + phase
        state = {name: torch.zeros_like(examples[phase][key]) for name, key in keys.items()}
        program = _export(step, (ids_B, position, state), shapes)
        # Whole caches of zeros would be saved with the program; of the examples only the structure is used.
        hollow = {name: tensor.new_zeros(()).expand(tensor.shape) for name, tensor in state.items()}
        program.example_inputs = ((ids_B, position, hollow), {})
        steps.append(program)
    return StepPrograms(start, tuple(steps))


def save_exported(folder: Path, model: LanguageModel) -> None:
    """Export a model and write the folder; each of the files but the first, ``start.pt2``, holds all weights.

    Args:
        folder: Made if it is missing. Each file replaces an older one in one move.
        model: As for :func:`export_scoring`.

    Raises:
        ValueError: As :func:`export_step`.
    """
    scoring, (start, steps) = export_scoring(model), export_step(model)
    folder.mkdir(parents=True, exist_ok=True)
    for name, program in {"scoring": scoring, "start": start, **_numbered(steps)}.items():
        temporary = folder / f".{os.getpid()}.{name}.pt2"
        torch.export.save(program, temporary)
        os.replace(temporary, folder / f"{name}.pt2")
    config = model.config
    sizes = ExportedSizes(config.vocab_size, config.context_length, config.total_stride)
    temporary = folder / f".{os.getpid()}.{SIZES_FILE}"
    temporary.write_text(json.dumps({"format": _FORMAT, **asdict(sizes)}, indent=2) + "\n")
    os.replace(temporary, folder / SIZES_FILE)


def load_exported(folder: Path) -> ExportedModel:
    """Read a folder of :func:`save_exported`; in memory, the weights are there once.

    Raises:
        ValueError: A file is missing or damaged; the message names it.
    """
    path = folder / SIZES_FILE
    try:
        data = json.loads(path.read_text())
        require(data.pop("format") == _FORMAT, f"its format is not {_FORMAT}")
        sizes = ExportedSizes(**data)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not the sizes of exported programs: {error}") from error
    scoring, start = _load(folder, "scoring"), _load(folder, "start")
    weights = scoring.state_dict()
    steps = []
    for phase in range(sizes.total_stride):
        step = _load(folder, f"step_{phase}")
        step.load_state_dict({name: weights[name] for name in step.state_dict()}, assign=True)
        steps.append(step)
    return ExportedModel(sizes, scoring, start, steps)


@dataclass(frozen=True)
class ExportedSizes:
    """What decoding and scoring have to know of an exported model; as in its configuration."""

    vocab_size: int
    context_length: int
    total_stride: int


class ExportedState:
    """What an exported model remembers of a batch of sequences between steps.

    Attributes:
        tensors: As the programs hand them on, each [B, ...].
        position: Tokens read so far.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.position = 0

    def reorder(self, rows_B: Tensor) -> None:
        """Keep the sequences ``rows_B`` (int64) in that order; a row may be named several times, as beams are."""
        self.tensors = {name: tensor.index_select(0, rows_B) for name, tensor in self.tensors.items()}


class ExportedModel:
    """Exported programs in the place of a model: a :class:`~deconv_model.causal_model.CausalModel`.

    It is always in evaluation mode, and runs without the code of the model. What the model reads at once, it reads
    token by token, but for scoring.
    """

    training = False

    def __init__(self, config: ExportedSizes, scoring: nn.Module, start: nn.Module, steps: list[nn.Module]) -> None:
        self.config = config
        self._scoring = scoring
        self._start = start
        self._steps = steps

    @torch.no_grad()
    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Return the logits of the next token at each position, [B, T, V].

        Raises:
            ValueError: The sequences are empty or longer than the context, or an id is not in the vocabulary.
        """
        return torch.stack(self._read(ids_BT)[0], dim=1)

    @torch.no_grad()
    def token_losses(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return ``-log p(targets)`` in nats for each position, [B, T]; costs a whole context whatever T.

        Raises:
            ValueError: The sequences are empty or longer than the context, or an id or a target is not in the
                vocabulary.
        """
        self._check(ids_BT)
        self._check(targets_BT)
        length = ids_BT.shape[1]
        padding = (0, self.config.context_length - length)
        losses_BT: Tensor = self._scoring(F.pad(ids_BT, padding), F.pad(targets_BT, padding))
        return losses_BT[:, :length]

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor) -> tuple[Tensor, ExportedState]:
        """Read the beginning of the sequences.

        Returns:
            The logits [B, V] of the token after the last one, and the state from which :meth:`step` goes on.

        Raises:
            ValueError: The sequences are empty or longer than the context, or an id is not in the vocabulary.
        """
        logits, state = self._read(ids_BT)
        return logits[-1], state

    @torch.no_grad()
    def step(self, ids_B: Tensor, state: ExportedState) -> Tensor:
        """Read one more token of each sequence, changing ``state``; return the logits [B, V] of the next one.

        Raises:
            ValueError: The context is full, or an id is not in the vocabulary.
        """
        self._check(ids_B[:, None], seen=state.position)
        return self._step(ids_B, state)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the weights."""
        return self._scoring.parameters()

    def train(self, mode: bool = True) -> ExportedModel:
        """Stay in evaluation mode.

        Raises:
            ValueError: ``mode`` is True: an exported model cannot be trained.
        """
        require(not mode, "an exported model cannot be trained")
        return self

    def _read(self, ids_BT: Tensor) -> tuple[list[Tensor], ExportedState]:
        self._check(ids_BT)
        state = ExportedState(self._start(ids_BT[:, 0]))
        return [self._step(ids_B, state) for ids_B in ids_BT.unbind(1)], state

    def _step(self, ids_B: Tensor, state: ExportedState) -> Tensor:
        program = self._steps[state.position % len(self._steps)]
        logits_BV: Tensor
        logits_BV, state.tensors = program(ids_B, state.position, state.tensors)
        state.position += 1
        return logits_BV

    def _check(self, ids_BT: Tensor, seen: int = 0) -> None:
        length, size = self.config.context_length, self.config.vocab_size
        end = seen + ids_BT.shape[1]
        require(seen < end <= length, f"sequence of {end} tokens: must be 1 to context_length = {length}")
        if ids_BT.device.type == "cpu" and ids_BT.numel():
            low, high = (int(bound) for bound in ids_BT.aminmax())  # on a GPU this would wait for the device
            require(0 <= low <= high < size, f"ids must be in [0, vocab_size = {size}), got {low} to {high}")


class _Scoring(nn.Module):
    """The losses, for any batch: the chunks of ``token_losses`` depend on it, those of the vocabulary do not."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        model = self.model
        x_BTC, weight_VC, cap = model._features(ids_BT), model._output_weight, model.config.logit_cap
        chunks = [capped_logits(x_BTC, chunk, cap).logsumexp(-1) for chunk in weight_VC.split(_VOCABULARY_CHUNK)]
        own_BT = (x_BTC * F.embedding(targets_BT, weight_VC)).sum(-1, keepdim=True)
        own_BT = capped_logits(own_BT, own_BT.new_ones(1, 1), cap)[..., 0]
        log_p_BT = own_BT - torch.stack(chunks).logsumexp(0)
        if model.pointer is not None:
            gate_BT, copied_BT = model.pointer.log_shares(x_BTC, ids_BT, targets_BT)
            log_p_BT = torch.logaddexp(gate_BT + log_p_BT, copied_BT)
        return -log_p_BT


class _Start(nn.Module):
    """Zeros of the given shapes and types, but for the batch."""

    def __init__(self, examples: dict[str, Tensor]) -> None:
        super().__init__()
        self.kinds = {name: (tensor.shape[1:], tensor.dtype) for name, tensor in examples.items()}

    def forward(self, ids_B: Tensor) -> dict[str, Tensor]:
        batch = ids_B.shape[0]
        return {name: ids_B.new_zeros(batch, *shape, dtype=dtype) for name, (shape, dtype) in self.kinds.items()}


class _Step(nn.Module):
    """The step at all positions that are ``phase`` modulo the strides.

    Args:
        model: The model.
        phase: As said.
        first: Of each part, its position in the decoding state after ``phase`` tokens.
        block: Of each part, how much that grows when the position grows by all strides.
        keys: By name in the exported state, the key in the decoding state.
    """

    def __init__(
        self,
        model: LanguageModel,
        phase: int,
        first: dict[nn.Module, int],
        block: dict[nn.Module, int],
        keys: dict[str, tuple[nn.Module, str]],
    ) -> None:
        super().__init__()
        self.model = model
        self.phase = phase
        self.first, self.block, self.keys = first, block, keys

    def forward(self, ids_B: Tensor, position: int, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        stride = self.model.config.total_stride
        blocks = position // stride
        torch._check(position == blocks * stride + self.phase)
        state = DecodingState()
        state.positions = {part: self.first.get(part, 0) + blocks * size for part, size in self.block.items()}
        state.tensors = {key: tensors[name] for name, key in self.keys.items()}
        logits_BV = self.model.step(ids_B, state)
        return logits_BV, {name: state.tensors[key] for name, key in self.keys.items()}


def _first_block(model: LanguageModel) -> tuple[list[dict[nn.Module, int]], list[dict[tuple[nn.Module, str], Tensor]]]:
    """Read as many tokens as all strides make.

    Returns:
        The positions of the decoding state after 0, 1, ... and all tokens, and its tensors. After none there are no
        tensors, but they have the shapes that they have after all, so those take the place.
    """
    state = DecodingState()
    positions: list[dict[nn.Module, int]] = [{}]
    tensors = []
    ids_B = torch.zeros(_BATCH, dtype=torch.int64, device=model.embedding.device)
    for _ in range(model.config.total_stride):
        model.step(ids_B, state)
        positions.append(dict(state.positions))
        tensors.append(dict(state.tensors))
    return positions, [tensors[-1], *tensors[:-1]]


def _frozen(model: LanguageModel) -> LanguageModel:
    """Return a copy in evaluation mode without gradients: a step would hold on to all before it."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def _export(module: nn.Module, examples: tuple[Any, ...], dynamic_shapes: tuple[Any, ...]) -> ExportedProgram:
    with torch.no_grad(), warnings.catch_warnings():
        # torch's LSTM lists its weights a second time, and torch.export takes the list for tensors of its own.
        warnings.filterwarnings("ignore", message="The tensor attributes .*_flat_weights")
        return torch.export.export(module, examples, dynamic_shapes=dynamic_shapes)


def _numbered(steps: tuple[ExportedProgram, ...]) -> dict[str, ExportedProgram]:
    return {f"step_{phase}": step for phase, step in enumerate(steps)}


def _load(folder: Path, name: str) -> nn.Module:
    path = folder / f"{name}.pt2"
    try:
        return torch.export.load(path).module()
    except Exception as error:  # which one depends on the part of the file that is wrong
        raise ValueError(f"{path}: not an exported program: {str(error).partition(chr(10))[0]}") from error
