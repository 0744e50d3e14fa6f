"""A static folder that runs a model in a browser: graphs, tokenizer, and the server's page."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from bitskip_export.onnx_files import write_onnx
from bitskip_export.onnx_graph import cache_name
from bitskip_export.pack import ExportError
from bitskip_ref.cache import cached_arrays, usual_kv_cache
from bitskip_ref.files import replace_file
from bitskip_ref.folder import Folder, read_folder
from bitskip_serve.page_files import page_file
from bitskip_text.tokenizer import read_tokenizer

LARGEST = 2_000_000_000  # weights; a browser's WebAssembly has 4 GB for all
PAGE = ("page.css", "page.js", "index.html")  # the last is what a browser asks for
FACTS = "model.json"  # what a site says of its model
OURS = ("sampling.js", "source.js")


@dataclass(frozen=True)
class Package:
    """Files of a package of npm that a site holds."""

    name: str
    version: str
    integrity: str  # sha512 of its archive, in base64
    files: dict[str, str]  # within the package -> within the site

    @property
    def archive(self) -> str:
        """The archive's name, as `npm pack` writes it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = (
    Package(
        "onnxruntime-web", "1.30.0",
        "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        {
            "dist/ort.wasm.min.mjs": "ort.js",
            "dist/ort-wasm-simd-threaded.mjs": "ort-wasm.js",
            "dist/ort-wasm-simd-threaded.wasm": "ort-wasm.wasm",
        },
    ),
    Package(
        "@huggingface/tokenizers", "0.2.0",
        "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        {"dist/tokenizers.min.mjs": "tokenizers.js", "LICENSE": "tokenizers-LICENSE"},
    ),
)  # fmt: skip


def write_site(
    folder: Path, out: Path, exits: Sequence[int] | None = None, packages: Path | None = None,
    force: bool = False,
) -> Path:  # fmt: skip
    """Write the site of a model folder; what else `out` holds stays. Returns its index.html.

    exits: those to choose from (None: the model's, `Folder.exits`). packages: a folder with the
    archives of `PACKAGES`; None: npm is asked for them. force: write over another page there.
    Raises ValueError for a model that cannot run in a browser with the bits of the other engines,
    and for another page, OSError where a package cannot be had.
    """
    if (out / PAGE[-1]).exists() and not ((out / FACTS).is_file() or force):
        raise ExportError(f"{out} holds a page of its own: choose another folder, or --force")
    model = read_folder(folder)
    check_model(model)
    third_party = [(name, data) for p in PACKAGES for name, data in unpacked(p, packages)]
    exits = sorted(set(exits or model.exits))
    kv_cache = usual_kv_cache(model.kv_cache, "float32", model.config)  # as `generate`
    graphs = write_onnx(model, out, exits, kv_cache, at_once=True)
    weights = onnx_weights(graphs[0])
    assert model.tokenizer is not None
    parts = [
        *third_party,
        *((name, (files("bitskip_export") / "web" / name).read_bytes()) for name in OURS),
        ("tokenizer.json", read_tokenizer(model.tokenizer).json.encode()),
        (FACTS, json.dumps(facts(model, exits, kv_cache, graphs, weights)).encode()),
        *((name, page_file(name)) for name in PAGE),
    ]
    for name, data in parts:
        with replace_file(out / name) as file:
            file.write(data)
    return out / PAGE[-1]


def check_model(model: Folder) -> None:
    """Raise ValueError for a model that a site cannot run."""
    config, where = model.config, model.path
    if config.linear == "float32":
        raise ValueError(
            f"{where} has float32 linear layers, whose bits an ONNX graph does not keep (SPEC "
            "4.5): --to web is for ternary and int8 models"
        )
    if config.parameters() > LARGEST:
        raise ValueError(
            f"{where} has {config.parameters():,} parameters; a browser holds {LARGEST:,}: "
            "use `bitskip serve`, whose page shows the same"
        )
    if model.tokenizer is None:
        raise ValueError(f"{where} has no tokenizer.json: the page could not read a prompt")
    tokenizer = read_tokenizer(model.tokenizer, config.vocab_size)
    stored, decoder = json.loads(tokenizer.json), tokenizer.decoder
    if stored["model"]["type"] != "BPE" or not (decoder.utf8 and decoder.streams):
        raise ValueError(
            f"{where}: its tokenizer is not a byte-level BPE (as those of GPT-2 and Llama 3), the "
            "only kind whose ids are known to be the same in JavaScript: use `bitskip serve`"
        )


def facts(
    model: Folder, exits: Sequence[int], kv_cache: str, graphs: Sequence[Path], weights: str
) -> dict[str, object]:
    """model.json: what the page shows (as the server's /props), and what the engine needs."""
    from bitskip_cpu.colours import palette

    config = model.config
    return {
        "model": model.path.resolve().name, "blocks": config.num_hidden_layers, "exits": exits,
        "trained_exits": model.trained_exits, "depths": exits,
        "context": config.max_position_embeddings,
        "vocab_size": config.vocab_size, "threads": 1, "kv_cache": kv_cache, "rules": [],
        "colours": palette(config.num_hidden_layers),
        "end_ids": model.end_ids, "first_token": model.bos_token_id,
        "repetition_penalty": model.sampling.get("repetition_penalty", 1.0),
        "past": {
            cache_name("past", i, name): {"type": np.dtype(kind).name, "shape": shape}
            for i in range(max(exits))
            for name, (kind, shape) in cached_arrays(config, kv_cache).items()
        },
        "files": {
            "graphs": {n: path.name for n, path in zip(exits, graphs, strict=True)},
            "weights": weights,
        },
    }  # fmt: skip


def onnx_weights(graph: Path) -> str:
    """The name of the weights' file beside a graph."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    return next(
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    )


def unpacked(package: Package, folder: Path | None) -> Iterable[tuple[str, bytes]]:
    """(name within the site, content) of a package's files. Raises OSError, ValueError."""
    archive = _from_folder(package, folder) if folder else _from_npm(package)
    found = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if found != package.integrity:
        raise ValueError(
            f"{package.archive} is not what was published: its SHA-512 is {found}, it must be "
            f"{package.integrity}: fetch it again with npm pack {package.name}@{package.version}"
        )
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        for inside, name in package.files.items():
            member = tar.extractfile(f"package/{inside}")
            assert member is not None
            yield name, member.read()


def _from_folder(package: Package, folder: Path) -> bytes:
    path = folder / package.archive
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: run npm pack {package.name}@{package.version} in that folder"
        )
    return path.read_bytes()


def _from_npm(package: Package) -> bytes:
    wanted = f"{package.name}@{package.version}"
    remedy = f"; or run npm pack {wanted} elsewhere and name the folder it lies in with --packages"
    npm = shutil.which("npm")
    if npm is None:
        raise OSError(f"npm is not installed, which brings {wanted}: install Node.js{remedy}")
    with TemporaryDirectory() as scratch:
        done = subprocess.run(
            [npm, "pack", wanted, "--silent", "--pack-destination", scratch],
            capture_output=True, text=True, cwd=scratch,
        )  # fmt: skip
        path = Path(scratch) / package.archive
        if done.returncode != 0 or not path.is_file():
            said = [line for line in done.stderr.splitlines() if line.strip()]
            why = said[0].strip()[:200] if said else f"exit code {done.returncode}"
            raise OSError(f"npm pack {wanted} failed ({why}): is there a network?{remedy}")
        return path.read_bytes()
