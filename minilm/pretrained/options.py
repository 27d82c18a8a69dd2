"""The options for loading a model, under our names and those of sentence-transformers 5 and 6.

In: keyword arguments. Out: `Loading`, checked; options that have no effect here are refused by
name; and, once there is a device, the dtype to compute in. Next: `encoder.py`.
"""

import os
import platform
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import torch

from minilm.disk import absolute
from minilm.errors import DtypeWarning, InputError, InputTypeError
from minilm.inference import int8
from minilm.inference.truncation import caller_level
from minilm.inputs import as_dtype
from minilm.pretrained.hub import AccessToken
from minilm.similarity import SimilarityFunction

__all__ = [
    "DEFAULT_PROMPTS",
    "SECRETS",
    "LoadOptions",
    "Loading",
    "dtype_on",
    "load_options",
    "to_keep",
]

# Prompts that every model has, as in the reference: they put nothing in front.
DEFAULT_PROMPTS = {"query": "", "document": ""}

# Options that are neither shown nor stored.
SECRETS = ("token", "use_auth_token")

# Settings of transformers that choose between ways to the same numbers.
_WITHOUT_EFFECT = ("attn_implementation", "low_cpu_mem_usage", "use_safetensors", "device_map")


# By dtype: what oneDNN is asked, and what a processor that multiplies in it has.
_PRODUCTS = {
    torch.bfloat16: ("_is_mkldnn_bf16_supported", "AVX-512 BF16, AMX, or ARM's BF16"),
    torch.float16: ("_is_mkldnn_fp16_supported", "AVX-512 FP16"),
}


class LoadOptions(TypedDict, total=False):
    """The options of `SentenceEncoder` and `SentenceEncoder.from_pretrained`.

    Attributes:
        cache_folder: The same as `cache_dir`.
        model_kwargs: `dtype` or `torch_dtype`, as the option `dtype`; but "auto" is float32 there:
            the dtype of the published file, which it is in the reference.
        reproducible: Compute in float64, and round the vectors once, to float32.
        processor_kwargs, tokenizer_kwargs: `model_max_length`: not supported, set `max_seq_length`.
        trust_remote_code: Has no effect: code in a model's folder is never run.
        backend: "torch".
    """

    revision: str | None
    device: str | torch.device | None
    dtype: str | torch.dtype | None
    reproducible: bool
    prompts: Mapping[str, str] | None
    default_prompt_name: str | None
    similarity_fn_name: str | SimilarityFunction | None
    truncate_dim: int | None
    cache_dir: str | os.PathLike[str] | None
    cache_folder: str | os.PathLike[str] | None
    token: str | bool | AccessToken | None
    use_auth_token: str | bool | AccessToken | None
    local_files_only: bool
    trust_remote_code: bool
    model_kwargs: Mapping[str, Any] | None
    processor_kwargs: Mapping[str, Any] | None
    tokenizer_kwargs: Mapping[str, Any] | None
    config_kwargs: Mapping[str, Any] | None
    model_card_data: Any
    backend: Literal["torch"]


@dataclass(frozen=True)
class Loading:
    """The options after `load_options`; `where` has the arguments of `hub.locate`."""

    device: str | torch.device | None
    dtype: str | torch.dtype | None
    reproducible: bool
    prompts: dict[str, str]
    default_prompt_name: str | None
    similarity_fn_name: str | SimilarityFunction | None
    truncate_dim: int | None
    where: dict[str, Any] = field(default_factory=dict)


def load_options(options: Mapping[str, Any]) -> Loading:
    """Read and check the options.

    Raises:
        InputTypeError: One is unknown, or of a wrong type.
        InputError: One has a value that can't be used, or has no effect here.
    """
    unknown = [name for name in options if name not in LoadOptions.__annotations__]
    if unknown:
        raise InputTypeError(f"there is no option {', '.join(unknown)}", unknown[0])
    for name in ("processor_kwargs", "tokenizer_kwargs", "config_kwargs", "model_card_data"):
        if options.get(name):
            raise InputError(f"{name} has no effect here; leave it out", name)
    backend = options.get("backend", "torch")
    if backend != "torch":
        raise InputError(f"backend is {backend!r}; this package has 'torch' only", "backend")
    kinds: dict[str, Any] = {"revision": str, "cache_dir": str | os.PathLike}
    kinds |= {"cache_folder": kinds["cache_dir"]} | dict.fromkeys(SECRETS, str | bool | AccessToken)
    for name, kind in kinds.items():
        if options.get(name) is not None and not isinstance(options[name], kind):
            # Without the value, which may be a secret of another type.
            raise InputTypeError(f"{name} is of type {type(options[name]).__name__}", name)
    reproducible, dtype = options.get("reproducible", False), _dtype(options)
    if not isinstance(reproducible, bool):
        raise InputTypeError(f"reproducible is {reproducible!r}; pass a bool", "reproducible")
    if reproducible and str(dtype).removeprefix("torch.") not in ("None", "float64"):
        raise InputError(
            f"reproducible=True computes in float64, and dtype is {dtype}; pass one of the two",
            "dtype",
        )
    options = to_keep(options)
    cache_dir = _one_of(options, "cache_dir", "cache_folder")
    token = _one_of(options, *SECRETS)
    return Loading(
        device=options.get("device"),
        dtype=torch.float64 if reproducible else dtype,
        reproducible=reproducible,
        prompts=_prompts(options.get("prompts")),
        default_prompt_name=options.get("default_prompt_name"),
        similarity_fn_name=options.get("similarity_fn_name"),
        truncate_dim=options.get("truncate_dim"),
        where={
            "revision": options.get("revision"),
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": options.get("local_files_only", False),
        },
    )


def dtype_on(device: torch.device, dtype: str | torch.dtype | None) -> torch.dtype:
    """Return the dtype to compute in on a device, of the one that was asked for.

    "auto" is the fastest whose vectors keep a cosine of 0.9999 with those in float64: bfloat16 if
    the device multiplies in it (the published model has 0.99994 or more then, on processors of
    two makers and on a GPU), else float32. A processor that doesn't is up to nine times slower in
    bfloat16 or float16 than in float32, which takes their place there, with a `DtypeWarning`.

    int8 is for the products only, of float32 weights; it is refused where it can't be had or
    doesn't pay.

    Raises:
        InputError: As in `as_dtype`; or it is int8, and the device has no exact sums of 8-bit
            products, or faster ones in bfloat16.
    """
    if str(dtype).removeprefix("torch.") == "int8":
        reason = int8.why_not()
        if device.type != "cpu":
            reason = f"it is for a CPU, not {device.type}; pass dtype='bfloat16', or device='cpu'"
        elif _has_amx() and has_products(torch.bfloat16):
            reason = (
                "this processor has AMX, by which bfloat16 is faster, and more exact; "
                "pass dtype='bfloat16'"
            )
        if reason:
            raise InputError(f"dtype is 'int8': {reason}", "dtype")
        return torch.int8
    if str(dtype) == "auto":
        is_ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        is_fast = is_ampere or (device.type == "cpu" and has_products(torch.bfloat16))
        return torch.bfloat16 if is_fast else torch.float32
    asked = as_dtype(dtype)
    if device.type != "cpu" or asked not in _PRODUCTS or has_products(asked):
        return asked
    name, seen = str(asked).removeprefix("torch."), torch.backends.cpu.get_cpu_capability()
    warnings.warn(
        f"dtype is {name!r}, but this processor ({seen}) has no products in it "
        f"({_PRODUCTS[asked][1]}) and is slower in it than in float32; the model computes in "
        "float32: pass dtype='float32', or 'auto' to go by the processor",
        DtypeWarning,
        stacklevel=caller_level(),
    )
    return torch.float32


def has_products(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices in bfloat16 or in float16.

    oneDNN is asked whether it takes the dtype, also as limited by `ONEDNN_MAX_CPU_ISA=AVX2`. On x86
    it takes bfloat16 even where it has to convert to float32 and back: with AVX-512 alone, at nine
    tenths of the speed of float32. So there the processor itself is asked as well, unless this
    torch is too old to know.
    """
    takes = getattr(torch.ops.mkldnn, _PRODUCTS[dtype][0], None)  # some builds have no oneDNN
    if takes is None or not takes():
        return False
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if dtype != torch.bfloat16 or not on_x86 or not hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or _has_amx()


def _has_amx() -> bool:
    """Whether the processor has matrix units that this torch knows of."""
    ask = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return ask is not None and bool(ask())


def to_keep(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options so that they can be stored: tokens hidden, paths absolute."""
    kept = dict(options)
    for name in SECRETS:
        if isinstance(kept.get(name), str):
            kept[name] = AccessToken(kept[name])
    for name in ("cache_dir", "cache_folder"):
        if kept.get(name):
            with suppress(OSError, TypeError, ValueError):  # an error when it is used
                kept[name] = str(absolute(kept[name]))
    return kept


def _one_of(options: Mapping[str, Any], name: str, alias: str) -> Any:
    if options.get(name) is not None and options.get(alias) is not None:
        raise InputError(f"{name} and {alias} are the same; pass one of them", alias)
    return options.get(alias) if options.get(name) is None else options[name]


def _prompts(prompts: Any) -> dict[str, str]:
    if prompts is None:
        return {}
    if not isinstance(prompts, Mapping):
        kind = type(prompts).__name__
        raise InputTypeError(f"prompts is {kind}; pass a dict of name and text", "prompts")
    for name, text in prompts.items():
        if not isinstance(name, str) or not isinstance(text, str):
            place = f"prompts[{name!r}]"
            raise InputTypeError(f"{place} is {text!r}; pass a string for a string", place)
    return dict(prompts)


def _dtype(options: Mapping[str, Any]) -> str | torch.dtype | None:
    settings = dict(options.get("model_kwargs") or {})
    for name in _WITHOUT_EFFECT:
        settings.pop(name, None)
    given = [settings.pop(name) for name in ("dtype", "torch_dtype") if name in settings]
    given = [dtype for dtype in given if dtype not in (None, "auto")]
    if settings:
        names = ", ".join(settings)
        raise InputError(f"model_kwargs has {names}, which have no effect here", "model_kwargs")
    if options.get("dtype") is not None:
        given.append(options["dtype"])
    if len({str(dtype).removeprefix("torch.") for dtype in given}) > 1:
        raise InputError("dtype and model_kwargs ask for different ones; pass one", "dtype")
    dtype: str | torch.dtype | None = given[-1] if given else None
    return dtype
