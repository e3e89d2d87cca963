"""Functions that export tests run in a forked process: a real Megatron model, random weights, its export."""

from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path
from typing import Any

from tests.support.probes import digest


def save_and_export(argv: list[str]) -> None:
    """Save a model under the plan with its logits in OUT/logits.pt, and export it to OUT/hf.

    Args:
        argv: the folder OUT, the token ids as JSON, then the command line of a run.
    """
    import torch

    from megatron_lrpath.cli import main

    out, tokens = Path(argv[0]), torch.tensor(json.loads(argv[1]))
    run = argv[2:]
    model = saved_model(run)
    with torch.no_grad():
        torch.save(megatron_logits(model, tokens), out / "logits.pt")
    plan = run[run.index("--plan") + 1]
    export = ["export", plan, "--run", "main", "--output", str(out / "hf"), "--max-shard-size", "100KB"]
    assert main(export) == 0


def saved_model(argv: list[str]) -> Any:
    """Build the plan's model, give every parameter random values, and save it as the run's step 1."""
    import torch
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training
    from megatron.training.checkpointing import save_checkpoint

    from megatron_lrpath.training import seams, setup
    from megatron_lrpath.training.guards.peers import own_store
    from megatron_lrpath.training.session import Session

    session = Session("cpu")
    seams.apply(session)
    args = setup.arguments(session, argv)
    args.skip_train, args.load, args.no_save_optim, args.no_save_rng = True, None, True, True
    training.initialize_megatron(store=own_store())
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model, _, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder, cfg_container=setup.configuration(args), pg_collection=groups
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in model[0].parameters():  # also norms and biases, which begin as ones and zeros
        noise = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() == 1 else 0.02)
        parameter.data += noise.to(parameter.dtype)
    args.iteration = 1
    save_checkpoint(1, model, None, None, 0)
    return model[0].eval()


def megatron_logits(model: Any, tokens: Any) -> Any:
    """Return the logits, [batch, sequence, padded vocabulary]."""
    import torch

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, None)


def transformers_model(folder: Path) -> Any:
    """Return the model in an exported folder, loaded as a user does; fail on missing or unknown keys."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def weights(folder: Path) -> dict[str, str]:
    """Return a digest of every tensor in a folder's safetensors."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            found |= {name: digest(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
    return found


def commands(argv: list[str]) -> None:
    """Run `lrpath` once for each argument list (JSON); all must succeed."""
    from megatron_lrpath.cli import main

    for line in argv:
        assert main(json.loads(line)) == 0, line


def peak_growth(argv: list[str]) -> None:
    """Export the checkpoint folder `argv[0]` to `argv[1]` and back; write the growth of memory in bytes."""
    from megatron_lrpath.export.card import Origin
    from megatron_lrpath.export.folder import Wishes, export_checkpoint
    from tools.import_hf import import_folder

    source, target, back = (Path(word) for word in argv)
    give_back_freed_memory()
    import transformers  # noqa: F401 - not part of the measurement

    growth = []
    for work, made in (
        (lambda: export_checkpoint(source, target, Origin(0), Wishes()), target),
        (lambda: import_folder(target, back), back),
    ):
        work()
        shutil.rmtree(made)  # the second time all libraries are loaded: this is measured
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = memory("VmRSS")
        work()
        growth.append(memory("VmHWM") - before)
    (target.parent / "growth.json").write_text(json.dumps(growth))


def give_back_freed_memory() -> None:
    """Make the C library return freed memory at once; by default it keeps a varying part of it."""
    threshold = -3  # M_MMAP_THRESHOLD of glibc's mallopt; setting it also ends its own adjustments
    assert ctypes.CDLL(None).mallopt(threshold, 64 * 1024) == 1


def memory(name: str) -> int:
    """Return a line of this process's memory statistics, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def follow_card(argv: list[str]) -> None:
    """Run the Python block of the model card in the folder `argv[0]`."""
    import os
    import re

    os.chdir(argv[0])
    code = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    assert code
    exec(code[1], {})
