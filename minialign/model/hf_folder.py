"""Hugging Face LLaVA folders in and out.

A folder holds config.json, model.safetensors (or shards with an index), tokenizer.json and
preprocessor_config.json. `NAMES` is the whole mapping between Hugging Face's keys and this code's.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minialign.errors import UserError
from minialign.fields import ANYTHING, object_of, path_below, read_fields, shortened
from minialign.files import folder_written_whole, read_json, write_json
from minialign.model.config import NOT_QUANTISED, read_config
from minialign.model.llava import Llava
from minialign.training import parallel

# Hugging Face's key (any of the layouts in use) -> ours. The first pattern that matches is applied.
NAMES = [
    (r"^(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?", "vision_tower."),
    (r"^(model\.)?multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^(model\.)?image_newline$", "image_newline"),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(language_model\.model|model\.language_model|model)\.", "language_model."),
]
# Ours -> the layout of the hub's llava-hf folders, for a new model.
HUB_NAMES = [
    (r"^vision_tower\.", "vision_tower.vision_model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^language_model\.", "language_model.model."),
]
INDEX = "model.safetensors.index.json"

# The types of weights that are read, by safetensors' names of them.
FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers that old versions of transformers stored.
IGNORED = re.compile(r"(position_ids|\.inv_freq)$")
# What belongs to the weights, and is copied with them.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def rename(key: str, table: list[tuple[str, str]]) -> str:
    """Apply the first pattern of `table` that matches."""
    for pattern, replacement in table:
        renamed, count = re.subn(pattern, replacement, key, count=1)
        if count:
            return renamed
    return key


def fingerprint(folder: Path, adapter: str | None = None, judge: str = "") -> str:
    """A short name of a folder's weights, an adapter's and, if `judge` is a folder, those of a
    reward model or an annotator.

    It is made of sizes, first and last MiB of the files, as 14 GB take long to read.
    """
    files = weight_files(folder)
    if adapter is not None:
        files.append(Path(adapter) / "adapter_model.safetensors")
    if judge and Path(judge).is_dir():
        files += sorted(Path(judge).glob("*.safetensors"))

    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, in transformers' order: model.safetensors, else the index's
    shards. Pickle is never loaded.
    """
    files, index = [folder / "model.safetensors"], folder / INDEX
    if index.exists():
        raw = read_json(index, "download the folder again")
        shard = path_below(".safetensors")
        shards = read_fields(index, raw, {"weight_map": object_of(ANYTHING)})["weight_map"]
        shards = read_fields(index, shards, dict.fromkeys(shards, shard), "weight_map.")
        if not files[0].exists():
            files = [folder / name for name in sorted(set(shards.values()))]
    missing = [file for file in files if not file.is_file()]
    if missing and (folder / "adapter_config.json").exists():
        message = "an adapter, and no whole model; give it as --adapter, and its base as --model"
        raise UserError(f"{folder}: {message}")
    if missing and any(file.suffix in (".bin", ".pt", ".pth") for file in folder.glob("*")):
        message = "only pickle weights (.bin, .pt), which are never loaded"
        raise UserError(f"{folder}: {message}; convert them to safetensors")
    if missing:
        message = "a model folder needs model.safetensors or its shards with an index"
        raise UserError(f"{missing[0]}: no such file; {message}")
    return files


@contextmanager
def opened(file: Path) -> Iterator:
    """A safetensors file, open for reading; a damaged one is a `UserError`."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        message = f"not a whole safetensors file ({shortened(str(error))}); download it again"
        raise UserError(f"{file}: {message}") from None


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """A file's keys and tensors, one tensor at a time.

    One that is not in floating point, or holds NaN or infinity, is a `UserError`.
    """
    with opened(file) as tensors:
        for key in keys_of(file, tensors):
            tensor = tensors.get_tensor(key)
            if not IGNORED.search(key):
                require_finite(
                    f"{file}: {shortened(key)}", tensor, "download or make the file again"
                )
            yield key, tensor


def read_note(file: Path, name: str, problem: str) -> dict:
    """The JSON object that stands in a safetensors file's metadata under a name; where there is
    none, or a damaged one, `problem` says what that means, and the remedy.
    """
    with opened(file) as tensors:
        noted = (tensors.metadata() or {}).get(name, "")
    try:
        note = json.loads(noted)
    except (ValueError, RecursionError):
        note = None
    if not isinstance(note, dict):
        raise UserError(f"{file}: {problem}")
    return note


def keys_of(file: Path, tensors) -> Iterator[str]:
    """The keys of an open file; a tensor that is not in floating point is a `UserError`."""
    for key in tensors.keys():  # noqa: SIM118 (safe_open is no dict)
        kind = tensors.get_slice(key).get_dtype()
        if kind not in FLOATS and not IGNORED.search(key):
            message = f"{shortened(key)} is of type {kind}; {NOT_QUANTISED.rule}"
            raise UserError(f"{file}: {message}; give another folder")
        yield key


def require_finite(name: str, tensor: Tensor, remedy: str) -> None:
    """Refuse a tensor with NaN or infinity in it, or with what is infinite in bfloat16."""
    if tensor.numel():
        low, high = torch.aminmax(tensor)  # one pass and no copy; of a NaN both are NaN
        if not -3e38 < low <= high < 3e38:
            raise UserError(f"{name} holds NaN, infinity or a number beyond 3e38; {remedy}")


def read_shapes(files: list[Path]) -> dict[str, torch.Size]:
    """The shapes of the files' tensors by our names, read from the headers."""
    shapes = {}
    for file in files:
        with opened(file) as tensors:
            for key in keys_of(file, tensors):
                name = rename(key, NAMES)
                if name in shapes:
                    message = f"{shortened(key)} stands for a tensor that the folder holds twice"
                    raise UserError(f"{file}: {message}; save it again")
                if not IGNORED.search(key):
                    shapes[name] = torch.Size(tensors.get_slice(key).get_shape())
    return shapes


def load_model(
    folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, shard: bool = False
) -> Llava:
    """Read a LLaVA folder onto `device` in `dtype`, frozen and in eval mode; with `shard` each
    process keeps its rows of every tensor alone.
    """
    model = empty_model(folder, dtype)
    if shard:
        parallel.shard_frozen(model, device)
    load_weights(model, folder, device)
    return model


def empty_model(folder: Path, dtype: torch.dtype) -> Llava:
    """The model of a folder on the meta device: names, shapes and types, and no memory yet.

    It is frozen; the projector, which is trained, is in float32 at least.
    """
    with torch.device("meta"):
        model = Llava(read_config(folder)).to(dtype)
    if dtype.itemsize < 4:
        model.multi_modal_projector.float()
    return model.requires_grad_(False).eval()


def load_weights(model: Llava, folder: Path, device: str) -> None:
    """Read the folder's tensors into a model of the meta device, one after another.

    Of a model in shards a process keeps its rows of each and lets go of the rest. Adapters and a
    head are not read: the caller fills them in. A missing, unexpected or wrongly shaped tensor is a
    `UserError` that names the keys.
    """
    places = places_of(model)
    shapes = read_shapes(weight_files(folder))
    if model.config.text.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    wanted = {name: model.get_parameter(names[0]).shape for name, names in places.items()}
    check_tensors(folder, wanted, shapes)

    if parallel.units(model):  # FSDP2's: memory for this process's rows
        model.to_empty(device=device)
    for file in weight_files(folder):
        for key, tensor in read_tensors(file):
            for name in places.get(rename(key, NAMES), []):
                set_parameter(model, name, tensor, device)
    model.tie_weights()


def places_of(model: Llava) -> dict[str, list[str]]:
    """Name of a parameter in a plain model -> its names in this one, whose adapters have wrapped
    some modules. The projector stands twice: the base's, and behind it the copy that is trained.
    """
    places: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        if "lora_" not in name and "scalar_head" not in name:
            plain = name.replace(".base.", ".").replace(".copy.", ".")
            places.setdefault(plain, []).append(name)
    return places


def set_parameter(model: nn.Module, name: str, value: Tensor, device: str) -> None:
    """Give a parameter its value, in the parameter's own type.

    In a model in shards its rows are filled in; else the tensor itself takes the place of one on
    the meta device.
    """
    parameter = model.get_parameter(name)
    if parallel.in_shards(parameter):
        parallel.fill_in(parameter, value)
        return
    # What is trained needs memory of its own, not its frozen twin's or the mapped file's.
    value = value.to(device, parameter.dtype, copy=parameter.requires_grad)
    module, _, leaf = name.rpartition(".")
    value = nn.Parameter(value, requires_grad=parameter.requires_grad)
    setattr(model.get_submodule(module), leaf, value)


def check_tensors(where: Path, wanted: dict[str, torch.Size], found: dict[str, torch.Size]) -> None:
    """Refuse missing, unexpected and wrongly shaped tensors, by name and shape."""
    problems = []
    if missing := wanted.keys() - found.keys():
        problems.append(f"missing tensors: {some_of(missing)}")
    if unexpected := found.keys() - wanted.keys():
        problems.append(f"unexpected tensors: {some_of(unexpected)}")
    if other := [key for key in wanted.keys() & found.keys() if wanted[key] != found[key]]:
        key = min(other)
        shapes = f"{list(found[key])}, the model's config.json says {list(wanted[key])}"
        problems.append(f"{key} has shape {shapes}")
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}; these weights belong to another model")


def some_of(keys: set[str]) -> str:
    """The first keys, and how many more there are."""
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return ", ".join(shortened(key) for key in sorted(keys)[:5]) + more


def copy_companions(source: Path, folder: Path, raw_config: dict) -> None:
    """What belongs to the weights: the config, and the files of tokenizer and preprocessing."""
    write_json(folder / "config.json", raw_config)
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def save_model(
    state: dict[str, Tensor], raw_config: dict, source: Path, folder: Path, dtype: torch.dtype
) -> None:
    """Write a new model's folder: `state` by our names, what belongs to it from `source`."""
    state = dict(state)
    embeddings = state["language_model.embed_tokens.weight"]
    if state["lm_head.weight"].data_ptr() == embeddings.data_ptr():  # tied: stored once
        del state["lm_head.weight"]
    tensors = {}
    for name, tensor in state.items():
        tensors[rename(name, HUB_NAMES)] = tensor.detach().to("cpu", dtype).contiguous()

    with folder_written_whole(folder) as partial:
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        copy_companions(source, partial, raw_config | {"dtype": str(dtype).removeprefix("torch.")})


def save_changed(
    source: Path,
    change: Callable[[str, Tensor], Tensor],
    raw_config: dict,
    folder: Path,
    add: Callable[[Path], None] | None = None,
) -> None:
    """Write the folder `source` anew with `change(our name, tensor)` in each tensor's place.

    `add(folder)` puts files of its own beside. File by file, as they were read: the layout of the
    keys, the shards and the types stay, so that whatever reads `source` reads the result, and what
    did not change has the same bytes.
    """
    with folder_written_whole(folder) as partial:
        for file in weight_files(source):
            with opened(file) as tensors:
                metadata = tensors.metadata()
            changed = {}
            for key, tensor in read_tensors(file):
                new = change(rename(key, NAMES), tensor)
                changed[key] = new.detach().to("cpu", tensor.dtype).contiguous()
                remedy = "train anew, at a lower rate or from a model in a wider type"
                require_finite(f"{folder}: {key} in {tensor.dtype}", changed[key], remedy)
            written = partial / file.relative_to(source)
            written.parent.mkdir(parents=True, exist_ok=True)
            save_file(changed, written, metadata=metadata)

        if not (partial / "model.safetensors").exists():
            shutil.copyfile(source / INDEX, partial / INDEX)
        copy_companions(source, partial, raw_config)
        if add is not None:
            add(partial)
