"""Adapters stacked on one frozen base: all are active, only the top one trains.

A `PeftModel` can hold several LoRA adapters; the order of its `peft_config` is the order of the stack, bottom first.
The outputs of active adapters add up, so a stack needs no merging, and any stage is evaluated by activating fewer
adapters.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from peft import (
    LoraConfig,
    LoraModel,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tuna_peft.errors import UserError
from tuna_peft.files import unreadable_is_a_user_error, write_text
from tuna_peft.json_text import read_json
from tuna_peft.models.base.load import model_id
from tuna_peft.models.forward import fused_lora

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
# In the configuration of an upper adapter, in place of the base that alone it does not fit.
UPPER_BASE = "(this adapter needs the adapters below it, {below}: see its README.md)"
_UPPER_README = """\
# Not an adapter for the base alone

`{name}` was trained on top of {below}, and gives wrong answers without it. PEFT loads this folder without an error.

Load the whole stack from the folder that holds `stack.json` (`tuna_peft.AdapterStack.from_pretrained`), or write one
adapter for plain PEFT with `tuna-peft combine`.
"""

# These initializations change the base weight, which is quantized or shared by the stack.
_BASE_CHANGING_INITS = ("pissa", "corda", "olora", "loftq", "eva", "orthogonal", "lora_ga")

# Settings of `LoraConfig` (PEFT 0.21) that make an adapter compute something other than plain LoRA.
_VARIANTS = (
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_bdlora",
    "monteclora_config",
    "kasa_config",
)


def adapter_names(model: torch.nn.Module) -> list[str]:
    """The stack from bottom to top; empty for a model without adapters."""
    return list(model.peft_config) if isinstance(model, PeftModel) else []


def push_adapter(model: PreTrainedModel | PeftModel, name: str, config: LoraConfig) -> PeftModel:
    """Adds a new adapter on top of the stack: the only one that trains, in fp32; those below are active and frozen.

    Raises:
        UserError: The name is taken, or a stack does not support the configuration.
    """
    require_stackable(config, name)
    _require_usable_name(model, name)
    fused_lora.register(config)
    try:
        if isinstance(model, PeftModel):
            stacked = model
            stacked.add_adapter(name, config)
        else:
            stacked = get_peft_model(model, config, adapter_name=name)
    except (ValueError, re.error) as error:  # no module matches, LoRA does not support one, or a bad expression
        raise UserError(
            f"adapter {name!r} does not fit this base: {str(error).splitlines()[0]}",
            fix="Check target_modules and related settings against the module names of the base.",
        ) from error
    _require_plain_targets(stacked, name)
    train_top_adapter(stacked)
    return stacked


def train_top_adapter(model: PeftModel) -> None:
    """Activates the whole stack; only its top adapter gets gradients."""
    names = adapter_names(model)
    _tuner(model).set_adapter(names)  # PeftModel.set_adapter takes one name only
    if names[:-1]:  # `set_adapter` made all of them trainable
        model.set_requires_grad(names[:-1], False)
    model.set_requires_grad(names[-1], True)


def drop_adapter(model: PeftModel, name: str) -> None:
    """Removes an adapter from the stack; afterwards the others are active and frozen."""
    model.delete_adapter(name)
    _tuner(model).set_adapter(adapter_names(model), inference_mode=True)


def take_over(model: PeftModel) -> None:
    """Replaces the adapter below the top by the top one, which starts from a copy of its weights and trains."""
    below, top = adapter_names(model)[-2:]
    set_peft_model_state_dict(model, adapter_state(model, below), adapter_name=top)
    drop_adapter(model, below)
    train_top_adapter(model)


@contextlib.contextmanager
def active_adapters(model: PreTrainedModel | PeftModel, names: Sequence[str]) -> Iterator[None]:
    """Within it, only `names` are active (none: the base alone), without gradients; restores the state afterwards."""
    if not isinstance(model, PeftModel):
        yield
        return
    before = list(model.active_adapters)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    try:
        if names:
            _tuner(model).set_adapter(list(names), inference_mode=True)
            yield
        else:
            with model.disable_adapter():
                yield
    finally:
        _tuner(model).set_adapter(before, inference_mode=True)
        for name in trainable:
            model.get_parameter(name).requires_grad_(True)


def save_adapter(model: PeftModel, name: str, folder: Path) -> None:
    """Writes one adapter in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

    PEFT loads an upper adapter without those below it and says nothing, so its `README.md` does. Its configuration
    has a sentence in place of the base's name, with which `AutoPeftModelForCausalLM` and transformers fail.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.cpu().contiguous() for key, value in adapter_state(model, name).items()}
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    base_model = model_id(cast(PreTrainedModel, model.get_base_model()))
    config.base_model_name_or_path = base_model or config.base_model_name_or_path
    names = adapter_names(model)
    if below := ", ".join(names[: names.index(name)]):
        config.base_model_name_or_path = UPPER_BASE.format(below=below)
        config.revision = None
        write_text(folder / "README.md", _UPPER_README.format(name=name, below=below))
    save_config(config, folder)


def save_config(config: PeftConfig, folder: Path) -> None:
    """Writes `adapter_config.json`; equal configurations give equal files.

    PEFT keeps `target_modules` and `exclude_modules` as sets, whose order differs between processes, and `stack.json`
    has hashes of the file.
    """
    config = copy.copy(config)
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    config.save_pretrained(str(folder))


def adapter_state(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one adapter, by PEFT's names for them; not copied."""
    # save_embedding_layers=False: PEFT's "auto" requests the base's vocabulary from the Hub, which fails offline.
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach() for key, value in state.items()}


def load_adapter(model: PreTrainedModel | PeftModel, name: str, folder: Path) -> PeftModel:
    """Adds a saved adapter on top of the stack, frozen and active.

    Raises:
        UserError: Names or shapes of its tensors do not fit this base; PEFT would skip some of them.
    """
    config, _ = read_adapter(folder, name)
    # The manifest checks the base by its weights; PEFT would compare names, and warn.
    config.base_model_name_or_path = None
    stacked = push_adapter(model, name, config)
    load_adapter_weights(stacked, name, folder)
    stacked.set_requires_grad(name, False)
    stacked.eval()
    return stacked


def load_adapter_weights(model: PeftModel, name: str, folder: Path) -> None:
    """Overwrites the weights of adapter `name` with the saved ones; every tensor must match."""
    with unreadable_is_a_user_error(folder / ADAPTER_WEIGHTS, "weights of an adapter"):
        saved = load_file(folder / ADAPTER_WEIGHTS)
    own = adapter_state(model, name)
    # Names that only one side has; without any, tensors whose shapes differ.
    wrong = sorted(set(saved) ^ set(own)) or sorted(key for key in own if own[key].shape != saved[key].shape)
    if wrong:
        raise UserError(
            f"the adapter does not fit this base: {len(wrong)} tensors differ, the first is {wrong[0]}",
            where=str(folder),
            fix="Load it on the base it was trained on.",
        )
    set_peft_model_state_dict(model, saved, adapter_name=name)


def read_adapter(folder: Path, name: str) -> tuple[LoraConfig, dict[str, tuple[int, ...]]]:
    """Reads a saved adapter once and checks what its hashes cannot show: that it is a usable adapter at all.

    Args:
        folder: The folder with `adapter_config.json` and `adapter_model.safetensors`.
        name: Its name, for errors.

    Returns:
        Its configuration, and the shape of each tensor by PEFT's name.

    Raises:
        UserError: A file cannot be read; there is no tensor, or one is not finite; the configuration's ranks or alphas
            are no positive numbers, or contradict the tensors.
    """
    file = folder / "adapter_config.json"
    stored = read_json(file, "configuration of an adapter")  # PEFT would pass over a repeated key
    where, fix = str(folder), "Get the adapter again, or train it again."
    with unreadable_is_a_user_error(file, "configuration of an adapter"):
        if missing := {"r", "lora_alpha"} - set(stored):  # for which PEFT has defaults
            raise UserError(f"adapter {name!r} has no {min(missing)}", where=where, fix=fix)
        config = LoraConfig.from_pretrained(str(folder))
        for what in ("target_modules", "exclude_modules"):
            modules = getattr(config, what)
            if isinstance(modules, str):
                re.compile(modules)
            elif modules is not None and not (isinstance(modules, (list, set)) and {*map(type, modules)} <= {str}):
                raise TypeError(f"{what} is {modules!r:.40}")
        ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
        for pattern in (*ranks, *alphas):  # PEFT takes the keys for regular expressions
            re.compile(pattern)
        for what, values in (
            ("r", [config.r, *ranks.values()]),
            ("lora_alpha", [config.lora_alpha, *alphas.values()]),
        ):
            for value in values:
                number = isinstance(value, int if what == "r" else (int, float)) and not isinstance(value, bool)
                if not number or not 0 < value < 1 << 20:  # also false for NaN and infinity
                    raise UserError(f"adapter {name!r} has {what}={value!r:.40}", where=where, fix=fix)
    shapes: dict[str, tuple[int, ...]] = {}
    with (
        unreadable_is_a_user_error(folder / ADAPTER_WEIGHTS, "weights of an adapter"),
        safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as tensors,
    ):
        for key in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
            tensor = tensors.get_tensor(key)
            shapes[key] = tuple(tensor.shape)
            if not tensor.is_floating_point() or not tensor.float().isfinite().all():
                raise UserError(f"adapter {name!r}: {key} holds NaN, infinity or no floats", where=where, fix=fix)
    if not shapes:
        raise UserError(f"adapter {name!r} has no tensors", where=where, fix=fix)
    for key in shapes:
        if LORA_A not in key and LORA_B not in key:
            continue
        a, b = shapes.get(key.replace(LORA_B, LORA_A)), shapes.get(key.replace(LORA_A, LORA_B))
        module = key.removeprefix(PEFT_PREFIX).removesuffix(LORA_A).removesuffix(LORA_B)
        rank = ranks.get(get_pattern_key(list(ranks), module), config.r)
        if not a or not b or len(b) < 2 or not a[0] == b[1] == rank:
            what = f"adapter {name!r}: r is {rank}, and {module} has factors of shapes {a} and {b}"
            raise UserError(what, where=where, fix=fix)
    return config, shapes


def fingerprint(model: PeftModel, name: str) -> str:
    """SHA-256 over an adapter's tensors in memory, to check that training did not change a frozen adapter."""
    digest = hashlib.sha256()
    for key, value in sorted(adapter_state(model, name).items()):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_stackable(config: PeftConfig, name: str) -> None:
    """Rejects adapters that are not plain LoRA, `scaling * B A x` on an unchanged base.

    Raises:
        UserError: Names the setting that a stack does not support, and the reason.
    """
    reason = None
    if not isinstance(config, LoraConfig):
        reason = f"a stack holds LoRA adapters, not {type(config).__name__}"
    elif config.use_dora:
        reason = "DoRA rescales the weight below it, so a stack of them depends on order and cannot be combined"
    elif config.bias != "none":
        reason = f"bias={config.bias!r} would train biases of the shared base"
    elif config.modules_to_save:
        reason = "modules_to_save would copy and train parts of the shared base"
    elif variant := next((field for field in _VARIANTS if getattr(config, field, None)), None):
        reason = f"with {variant} it computes more than scaling * B A x, so it cannot be combined and merged"
    elif str(config.init_lora_weights).lower().startswith(_BASE_CHANGING_INITS):
        reason = f"init_lora_weights={config.init_lora_weights!r} changes the frozen base below the stack"
    elif _targets_head(config.target_modules):
        reason = "LoRA on the head: log-probabilities come from the frozen head's weight, so it would never be used"
    if reason:
        raise UserError(f"adapter {name!r} cannot join the stack: {reason}", fix="Use plain LoRA (rsLoRA is fine).")


def _require_plain_targets(model: PeftModel, name: str) -> None:
    """Checks that the adapter wraps linear layers only (`Conv1D` is one): its update is then `scaling * B A x`.

    PEFT also adapts embeddings and, in a mixture of experts, the experts' stacked weights, even for `all-linear`.
    """
    base = model.get_base_model()
    wrapped = {path: layer.get_base_layer() for path, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    plain = {path.rpartition(".")[2] for path, layer in wrapped.items() if isinstance(layer, torch.nn.Linear | Conv1D)}
    other = [(path, type(layer).__name__) for path, layer in wrapped.items() if path.rpartition(".")[2] not in plain]
    if isinstance(base.get_output_embeddings(), LoraLayer):
        raise UserError(f"adapter {name!r} would train the output head", fix="Leave it out of target_modules.")
    if other:
        path, kind = other[0]
        names = ", ".join(sorted(plain))
        raise UserError(
            f"adapter {name!r} would train {path!r}, which is a {kind} and not a linear layer",
            fix=f"Set target_modules to the linear layers: [{names}]."
            if names
            else "Use another base or other layers.",
        )


def _tuner(model: PeftModel) -> LoraModel:
    """The tuner inside a `PeftModel`, whose `set_adapter` can activate several adapters at once."""
    return cast(LoraModel, model.base_model)


def _targets_head(target_modules: str | Sequence[str] | None) -> bool:
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, "lm_head") is not None
    return "lm_head" in (target_modules or ())


def _require_usable_name(model: PreTrainedModel | PeftModel, name: str) -> None:
    if name in adapter_names(model):
        raise UserError(f"the stack already has an adapter {name!r}", fix="Give the new adapter another name.")
    # The name becomes a folder, and PEFT removes it from parameter names.
    parts = {part for parameter, _ in model.named_parameters() for part in parameter.split(".")}
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or name in parts:
        raise UserError(f"{name!r} cannot name an adapter", fix="Use letters, digits, - and _, and no module's name.")
