"""Files are read through doors: JSON by `reading`, YAML by `plan.file.source`, checkpoints by `checkpoints`.

A use of a library's own reader outside of them fails here, unless it is listed with its reason.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

import pytest

from tests.support import ROOT

JSON = ("json.load", "json.loads", "json.JSONDecoder", "json.decoder", "raw_decode")
YAML = (
    "yaml.load",
    "yaml.load_all",
    "yaml.safe_load",
    "yaml.safe_load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.compose",
    "yaml.parse",
    "yaml.SafeLoader",
    "yaml.FullLoader",
    "yaml.UnsafeLoader",
    "yaml.Loader",
    "yaml.CSafeLoader",
    "tomllib.load",
    "tomllib.loads",
)
PICKLES = (
    "torch.load",
    "torch.jit.load",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "pickle._Unpickler",
    "dcp.load",
    "dcp.load_state_dict",
    "torch.distributed.checkpoint.load",
    "FileSystemReader",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "dill.load",
    "dill.loads",
    "cloudpickle.load",
    "cloudpickle.loads",
    "np.load",
    "numpy.load",
    "read_pickle",
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "recv_object_list",
    "multiprocessing.connection",
)

OWN = "a value of this process, once through JSON"
SENT = "what processes of one run send each other, signed"
GROUP = "what processes of one run send each other over their process group (docs/security.md: the network)"
SHIPPED = "a file of the package"
ALLOWED: dict[str, dict[str, str]] = {
    "megatron_lrpath/reading.py": {"json.JSONDecoder": "the door to JSON"},
    "megatron_lrpath/sealed.py": {"json.loads": OWN},
    "megatron_lrpath/plan/file/edit.py": {
        "yaml.compose": "the places of a plan's text that its own reader has read within bounds",
        "yaml.SafeLoader": "the same",
    },
    "megatron_lrpath/plan/identity.py": {"json.loads": OWN},
    "megatron_lrpath/training/options/from_arguments.py": {"json.loads": OWN},
    "megatron_lrpath/tokenizers/fast_hugging_face.py": {"json.loads": OWN},
    "megatron_lrpath/training/guards/channel.py": {"json.loads": SENT},
    "megatron_lrpath/data/preprocess/worker.py": {
        "json.loads": "a document's line, where speed counts; a number, depth or letter too many rejects the document",
        "json.JSONDecoder": "the same",
        "raw_decode": "the same",
    },
    "megatron_lrpath/evaluate/perplexity.py": {"broadcast_object_list": GROUP, "all_gather_object": GROUP},
    "megatron_lrpath/launch/preflight.py": {
        "json.loads": "a word of a command line that this package writes",
        "broadcast_object_list": GROUP,
        "all_gather_object": GROUP,
    },
    "megatron_lrpath/training/checkpoints/commit.py": {"broadcast_object_list": GROUP},
    "megatron_lrpath/training/first_weights.py": {"recv_object_list": f"{GROUP}; weights only"},
    "megatron_lrpath/training/guards/guard.py": {"all_gather_object": GROUP},
    "megatron_lrpath/plan/arguments.py": {"tomllib.loads": SHIPPED},
    "megatron_lrpath/plan/file/source.py": {"yaml.SafeLoader": "the door to YAML"},
    "megatron_lrpath/experiment/load.py": {"yaml.safe_load": "a plan that this process made as text"},
    "megatron_lrpath/launch/slurm/ledger.py": {
        "yaml.compose": "a plan that has been through the door already",
        "yaml.SafeLoader": "the same",
    },
    "megatron_lrpath/checkpoints/reader.py": {"FileSystemReader": "the door to a checkpoint"},
    "megatron_lrpath/checkpoints/objects.py": {
        "torch.load": "weights only, of what was parsed as data before"
    },
    "megatron_lrpath/data/index_cache.py": {
        "np.load": "allow_pickle=False",
        "numpy.load": "the same",
    },
    "scripts/prose.py": {"tomllib.loads": "the style, a file of the project"},
    "scripts/call_path.py": {"json.loads": "lines of a process that the script started"},
}


@cache
def trees() -> dict[str, ast.Module]:
    """Return every module of the package, the tools and the scripts, parsed."""
    files = (
        path
        for name in ("megatron_lrpath", "tools", "scripts")
        for path in sorted((ROOT / name).rglob("*.py"))
    )
    files = (*files, ROOT / "pretrain_gpt.py")
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` for names and attributes; any other prefix is omitted."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else node.attr
    return node.id if isinstance(node, ast.Name) else ""


def full_names(tree: ast.Module) -> Iterator[str]:
    """Yield every name that a module uses or imports, prefixed by its module's name, under any alias."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                known[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and (name := dotted(node)):
            first, dot, rest = name.partition(".")
            yield name
            yield f"{known.get(first, first)}{dot}{rest}"


def uses(tree: ast.Module, readers: tuple[str, ...]) -> set[str]:
    """Return the readers that a module names."""
    names = set(full_names(tree))
    return {one for one in readers if any(name == one or name.endswith(f".{one}") for name in names)}


@pytest.mark.parametrize("readers", [JSON, YAML, PICKLES], ids=["json", "yaml", "pickles"])
def test_files_are_read_through_the_doors(readers: tuple[str, ...]) -> None:
    outside = {
        f"{file}: {name}"
        for file, tree in trees().items()
        for name in uses(tree, readers) - ALLOWED.get(file, {}).keys()
    }
    assert outside == set()


def test_every_exemption_is_needed() -> None:
    unneeded = {
        f"{file}: {name}"
        for file, names in ALLOWED.items()
        for name in names.keys() - uses(trees()[file], JSON + YAML + PICKLES)
    }
    assert unneeded == set()


@pytest.mark.parametrize(
    "text",
    [
        "import json\njson.loads(x)",
        "from json import loads as read\nread(x)",
        "import json as j\nj.load(x)",
        "from yaml import safe_load\nsafe_load(x)",
        "import torch\ntorch.load(x)",
        "import torch.distributed.checkpoint as dcp\ndcp.load(x)",
        "from torch.distributed.checkpoint import load\nload(x)",
        "from torch.distributed.checkpoint.filesystem import FileSystemReader",
        "import pickle\npickle.Unpickler(x).load()",
        "import numpy\nnumpy.load(x)",
        "def f():\n    import json\n    return map(json.loads, x)",
    ],
)
def test_a_use_outside_is_found(text: str) -> None:
    assert uses(ast.parse(text), JSON + YAML + PICKLES)


def test_what_is_no_reader_is_not_found() -> None:
    assert not uses(
        ast.parse("import json\njson.dumps(x)\nplan.load(x)\nself.loads(x)"), JSON + YAML + PICKLES
    )
