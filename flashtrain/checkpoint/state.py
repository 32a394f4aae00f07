"""What a checkpoint holds of a run: parameters and optimizer under logical names, and every RNG.

Names do not know the layout: `model/<parameter>` and `optimizer/<key>/<parameter>` stand for whole
tensors, of which this rank holds the boxes that `shard_of` says.
"""

import base64
import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from flashtrain.checkpoint.integrity import CheckpointError
from flashtrain.checkpoint.tensors import LocalTensor, local_tensor
from flashtrain.model.shard import shard_of


@dataclass(frozen=True)
class State:
    tensors: dict[str, LocalTensor]  # views of live memory, not copies
    scalars: dict[str, Tensor]  # 0-dim, equal on all ranks that know the name; kept as JSON
    # parameters of the model of which this rank holds nothing: a pipeline's other stages have them
    elsewhere: frozenset[str] = frozenset()


def collect(model: nn.Module, optimizer: Optimizer | None = None) -> State:
    """Views of all that training changes. A parameter with two names (tied) appears once.

    Raises CheckpointError for a persistent buffer or an optimizer entry that has no logical name.
    """
    refuse_buffers(model)
    states = {} if optimizer is None else optimizer.state
    return collect_parameters(dict(model.named_parameters()), states)


def collect_parameters(
    parameters: Mapping[str, Tensor], states: Mapping[Tensor, Mapping[str, Any]]
) -> State:
    """`collect` for parameters by name and optimizer state by parameter, as an engine holds them
    beside its model."""
    names = {parameter: name for name, parameter in parameters.items()}
    tensors = {f"model/{name}": local_tensor(p, shard_of(p)) for p, name in names.items()}
    scalars: dict[str, Tensor] = {}
    for parameter, name, key, value in _optimizer_entries(states, names):
        full = f"optimizer/{key}/{name}"
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{full} is a {type(value).__name__}: a checkpoint holds tensors only"
            )
        # in this order: the moments of a 0-dim parameter are tensors, its step is a scalar
        if value.dim() == 0 and (parameter.dim() > 0 or key == "step"):
            scalars[full] = value
        elif value.shape == parameter.shape:
            tensors[full] = local_tensor(value, shard_of(parameter))
        else:
            raise CheckpointError(
                f"{full} is {list(value.shape)} and its parameter {list(parameter.shape)}: only "
                "optimizer state with the shape of its parameter can be cut and joined"
            )
    return State(tensors, scalars)


def refuse_buffers(model: nn.Module) -> None:
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    lost = [name for name in model.state_dict() if name not in known]
    if lost:
        raise CheckpointError(
            f"{lost[0]} is a persistent buffer and would not be saved: make it a parameter, or "
            "persistent=False if it can be computed anew"
        )


def _optimizer_entries(
    states: Mapping[Tensor, Mapping[str, Any]], names: dict[Tensor, str]
) -> Iterator[tuple[Tensor, str, str, Any]]:
    for parameter, entries in states.items():
        if parameter not in names:
            raise CheckpointError(
                f"the optimizer holds a parameter of shape {list(parameter.shape)} that the model "
                "does not: build it over model.parameters()"
            )
        for key, value in entries.items():
            if value is not None:  # such as SGD's momentum_buffer without momentum
                yield parameter, names[parameter], key, value


def prepare(parameters: Mapping[str, Tensor], optimizer: Optimizer, saved: Collection[str]) -> None:
    """Make the state of a fresh optimizer, for the parameters that `saved` has state of.

    torch makes it at the first step and only for parameters with a gradient, so a fresh optimizer
    has nothing to load into. Step counters lie where torch expects them: on the device for the
    fused and capturable kinds, else on the host.
    """
    with_state = {name.split("/", 2)[2] for name in saved if name.startswith("optimizer/")}
    names = {parameter: name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state.get(parameter) or names.get(parameter) not in with_state:
                continue
            fresh_state = getattr(optimizer, "fresh_state", None)
            if fresh_state is None and not isinstance(optimizer, Adam):  # AdamW is one
                raise CheckpointError(
                    f"cannot resume a fresh {type(optimizer).__name__}: its state is unknown "
                    f"here, only that of {AdamW.__name__} is, or one that has a `fresh_state`"
                )
            optimizer.state[parameter] = (fresh_state or adam_state)(parameter, group)


def adam_state(parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """What Adam and AdamW keep of a parameter, before their first step."""
    on_device = group["fused"] or group["capturable"]
    double = torch.get_default_dtype() == torch.float64 and not group["fused"]
    moments = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(group["amsgrad"])
    return {
        "step": torch.zeros(
            (),
            dtype=torch.float64 if double else torch.float32,
            device=parameter.device if on_device else "cpu",
        ),
        **{key: torch.zeros_like(parameter, requires_grad=False) for key in moments},
    }


def rng_state() -> dict[str, Any]:
    """The state of every generator of this process, as JSON."""
    version, words, gauss = random.getstate()
    legacy = dict(np.random.get_state(legacy=False))
    key = np.asarray(legacy["state"]["key"], dtype=np.uint32)
    state: dict[str, Any] = {
        "python": [version, _text(np.asarray(words, dtype=np.uint32).tobytes()), gauss],
        "numpy": {
            "bit_generator": legacy["bit_generator"],
            "key": _text(key.tobytes()),
            "pos": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
        "torch": _text(torch.get_rng_state().numpy().tobytes()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state().numpy().tobytes())
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`; a CUDA generator saved or present on one side only is left."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(np.frombuffer(_bytes(words), np.uint32).tolist()), gauss))
    numpy = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": numpy["bit_generator"],
            "state": {"key": np.frombuffer(_bytes(numpy["key"]), np.uint32), "pos": numpy["pos"]},
            "has_gauss": numpy["has_gauss"],
            "gauss": numpy["gauss"],
        }
    )
    torch.set_rng_state(_byte_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_byte_tensor(state["cuda"]))


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)


def _byte_tensor(text: str) -> Tensor:
    return torch.tensor(list(_bytes(text)), dtype=torch.uint8)
