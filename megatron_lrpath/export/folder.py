"""Export a checkpoint, with its chat template, to a Hugging Face folder, which appears when complete.

`fresh_export` exports only if the folder is missing or the checkpoint has changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.console import say
from megatron_lrpath.errors import UserError
from megatron_lrpath.export import architecture
from megatron_lrpath.export.card import Origin, model_card, origin_of, usage
from megatron_lrpath.export.carried import Carried
from megatron_lrpath.export.checkpoint import CheckpointReader
from megatron_lrpath.export.config import to_config
from megatron_lrpath.export.weights import EMBEDDING, write_weights
from megatron_lrpath.files import appearing_folder, atomic_write_json, atomic_write_text
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.reading import read_object, why
from megatron_lrpath.runs.checkpoints import checkpoint_folder, require_checkpoint
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.results import model_fingerprint
from megatron_lrpath.tokenizers.files import find_tokenizer, write_tokenizer

RECORD = "lrpath_export.json"  # in an exported folder: the checkpoint that it was made from
STORED = "lrpath_chat"  # the argument of a fine-tuned checkpoint with its chat
OWN_TEMPLATES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Chat:
    """The stored chat of a fine-tuning: Jinja template, new control tokens (ids), end token of an answer."""

    template: str
    control_tokens: dict[str, int]
    stop_token: int | None

    @property
    def rows(self) -> int:
        """Rows of the embeddings that the control tokens need; 0 if there are no new ones."""
        return max(self.control_tokens.values(), default=-1) + 1


def stored_chat(args: Any) -> Chat | None:
    """Return the chat stored in a checkpoint's arguments. Raise KeyError, TypeError or ValueError."""
    if not isinstance(stored := getattr(args, STORED, None), dict):
        return None
    tokens = {str(token): int(number) for token, number in dict(stored["control_tokens"]).items()}
    stop = stored["stop_token"]
    return Chat(str(stored["template"]), tokens, None if stop is None else int(stop))


def write_chat(chat: Chat, folder: Path) -> list[str]:
    """Complete the tokenizer files in `folder`; return notes for the user.

    From then on, control tokens that are spelled out in a text are control tokens, as chat templates need it.

    Raises:
        UserError: the tokenizer gives the control tokens different ids than the training did.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return ["the chat template is not written, since there are no tokenizer files."]
    add_control_tokens(chat, folder / "tokenizer.json")
    try:
        config = read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({why(error)}).") from None
    config |= {"chat_template": chat.template, "split_special_tokens": False}
    if chat.control_tokens:
        known = config.get("extra_special_tokens", config.get("additional_special_tokens", []))
        names = [*(known if isinstance(known, list) else []), *chat.control_tokens]
        config["extra_special_tokens"] = list(dict.fromkeys(names))
        config.pop("additional_special_tokens", None)
    atomic_write_json(path, config)
    for name in OWN_TEMPLATES:  # transformers would prefer them
        (folder / name).unlink(missing_ok=True)
    notes = [
        "Control tokens spelled out in a text are read as control tokens, as the chat template needs it."
    ]
    if chat.control_tokens:
        notes.append(
            f"New control tokens: {', '.join(chat.control_tokens)} (tokenizer.model does not have them)."
        )
    return notes


def add_control_tokens(chat: Chat, path: Path) -> None:
    """Add the new control tokens to `tokenizer.json`. Raise UserError if their ids differ from training."""
    from tokenizers import AddedToken, Tokenizer

    if not chat.control_tokens:
        return
    tokenizer = Tokenizer.from_file(str(path))
    tokens = sorted(chat.control_tokens, key=lambda token: chat.control_tokens[token])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    got = {token: tokenizer.token_to_id(token) for token in tokens}
    if got != chat.control_tokens:
        raise UserError(
            f"the tokenizer gives the control tokens the ids {got}, the training had {chat.control_tokens}: is it "
            "another tokenizer (--tokenizer)?"
        )
    tokenizer.save(str(path))


IMPORTED_VOCABULARY = "lrpath_vocab_size"  # the argument stored with imported weights
SHARD_BYTES = 4 * 1000**3


@dataclass(frozen=True)
class Wishes:
    """The user's settings of an export.

    Attributes:
        dtype: the type of the weights, None as they are stored.
        shard_bytes: the maximum size of one safetensors file in bytes.
        tokenizer: the path of the tokenizer if it differs from the checkpoint's arguments.
        vocab_size: rows of the embeddings to keep, None for the tokenizer's number of tokens.
        force: replace an earlier export.
    """

    dtype: str | None = None
    shard_bytes: int = SHARD_BYTES
    tokenizer: str | None = None
    vocab_size: int | None = None
    force: bool = False


@dataclass(frozen=True)
class Exported:
    """A finished export: its folder, class, files of weights, and notes for the user."""

    folder: Path
    kind: str
    weights: list[str]
    notes: list[str]


def export_checkpoint(checkpoint: Path, target: Path, origin: Origin, wishes: Wishes) -> Exported:
    """Write the model of one `torch_dist` checkpoint as a Hugging Face folder; return what was written.

    `checkpoint` is the folder of one step; the name of `target` is the model's name in the card, which
    contains the facts of `origin`.

    Raises:
        UserError: the checkpoint, its tokenizer or the target cannot be used; no files remain then.
    """
    refuse_target(target, wishes.force)
    reader = CheckpointReader(checkpoint)
    args = reader.args
    try:
        chat = stored_chat(args)
        place = wishes.tokenizer or args.tokenizer_model
        tokenizer = find_tokenizer(args.tokenizer_type, place, args, wishes.vocab_size)
        # An imported model can have more rows than its tokenizer has tokens.
        rows = wishes.vocab_size or getattr(args, IMPORTED_VOCABULARY, None) or tokenizer.vocab_size
        rows = max(rows, chat.rows if chat else 0)
        carried = Carried.of_arguments(args)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{checkpoint}: its arguments do not say which tokenizer the model has ({why(error)}); restore it."
        ) from None
    model = architecture.from_megatron(args, rows, carried.kind)
    carried, lost = carried.within(rows)
    reader.verify(fingerprint=True)
    dtype = wishes.dtype or str(reader.dtype(EMBEDDING)).removeprefix("torch.")
    with appearing_folder(target) as folder:
        weights = write_weights(reader, model, folder, wishes.dtype, wishes.shard_bytes)
        notes = write_tokenizer(tokenizer, folder, model.max_positions)
        notes += [*(write_chat(chat, folder) if chat else []), *lost]
        config = to_config(model, dtype, carried.tokens(tokenizer.tokens))
        atomic_write_json(folder / "config.json", carried.config | config)
        generation = carried.generation_config(tokenizer.tokens, chat.stop_token if chat else None)
        atomic_write_json(folder / "generation_config.json", generation)
        how = usage(chats=chat is not None) if tokenizer.path is not None else ""
        card = model_card(target.name, model, dtype, origin, notes, how=how)
        atomic_write_text(folder / "README.md", card)
        if origin.checkpoint is not None:
            atomic_write_json(folder / RECORD, {"step": origin.step, "checkpoint": origin.checkpoint})
    return Exported(target, architecture.CLASSES[model.kind], weights, notes)


def refuse_target(target: Path, force: bool) -> None:
    """Raise UserError if `target` is not empty, unless it is an export and `force` is set."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / "config.json").is_file():
        raise UserError(f"{target}: exists and is not an exported model; name another --output.")
    if not force:
        raise UserError(f"{target}: there is an exported model already; --force replaces it.")


def recorded_checkpoint(folder: Path) -> str | None:
    """Return the fingerprint of the checkpoint that an exported model was made from; None if it is not
    recorded.
    """
    try:
        found = read_object(folder / RECORD).get("checkpoint")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def is_export_of(exported: Path, run: Path, step: int) -> bool:
    """Return whether `exported` is the model of the checkpoint of `step` of the run in the folder `run`."""
    wanted = model_fingerprint(run, step)
    return wanted is not None and recorded_checkpoint(exported) == wanted


def fresh_export(plan: Plan, run: Run, step: int, target: Path, again: str = "") -> Path:
    """Return the model of a run's `step` as a Hugging Face folder in `target`; export it if it does not
    exist.

    Args:
        plan: the plan of the run.
        run: the run.
        step: the step of the checkpoint.
        target: the folder; an export of an older checkpoint is replaced.
        again: the command that replaces a folder without a record of its checkpoint; if empty, the folder is replaced.

    Raises:
        UserError: the checkpoint cannot be exported, or the folder is not known to be an export of a checkpoint.
    """
    checkpoints = RunFolder(plan.folder(run)).checkpoints
    if is_export_of(target, plan.folder(run), step):
        return target
    found = recorded_checkpoint(target)
    require_checkpoint(checkpoints, step)
    is_there = (target / "config.json").is_file()
    if is_there and found is None and again:
        raise UserError(
            f"{target}: an exported model that does not say which checkpoint it is of (an earlier version made it, "
            f"or another tool); replace it: {again}"
        )
    say(
        f"{run.key}: exporting step {step:,}{' again, because the checkpoint has changed' if found else ''} …"
    )
    export_checkpoint(
        checkpoint_folder(checkpoints, step), target, origin_of(plan, run, step), Wishes(force=True)
    )
    return target
