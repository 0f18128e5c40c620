"""Which model classes of the installed transformers `patch` covers, as a page of documentation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from .forms import find_form
from .patching import rotary_functions

__all__ = ["HERE", "Row", "page", "rows"]

HERE = Path(__file__).parent
_DEFINES_ONE = re.compile(r"def \w*apply_\w*(rotary|rope)")

_PAGE = """\
# Models of transformers that fused-rope covers

`fused_rope.compat.transformers.patch(model)` replaces the rotary function of the model's family;
what it puts in its place is told by signature and by reference checks, never guessed. This page is
made by `python -m fused_rope.compat.transformers` and names every model class of
transformers {version} in whose module a rotary function is defined. Models that are combined from
others (LLaVA from Llama, say) are covered where their parts are.

**{patched} of {classes} model classes are patched**, by {functions} functions of {forms} forms;
{alone}.

* Outputs are the model's own bits wherever it rotates in its dtype or in float32 with one rounding,
  except in two forms. *complex*: PyTorch may contract its products (one unit in the last place).
  *interleaved, order preserved*: the model permutes the elements of q and k before it rotates them,
  ours keeps their order; so attention scores are equal up to the order of their sums, and a cache's
  keys are for patched models only.
* The result has q's dtype. Where tables are wider than q, as under autocast, many original
  functions return the wider dtype.
* Of full-width tables one half is read. Each new table is compared with its other half, once for
  all layers; if they differ, the family gets its own function back, with a warning. On CUDA this
  synchronizes once for a rotary module of transformers, and once a forward for other tables.
* Calls that the operator does not cover (unusual shapes, dtypes or arguments) run the model's own
  function.
* torch.compile is given the model's own function by default, which Inductor fuses with the norms
  and projections around it; `compiled="fused"` gives it the operator. *interleaved, order
  preserved* and *half, packed, in place* are the operator always.
* Rotary modules whose cosines and sines depend on position_ids alone compute them in three kernels
  instead of nine, bitwise identical; on the CPU they gather kept rows where `rows=` bounds the
  positions. Dynamic and longrope scaling, M-RoPE, and a float32 matmul precision below "highest"
  keep the module's own forward.

| model classes | function | form |
| --- | --- | --- |
{table}
"""


@dataclass(frozen=True)
class Row:
    """A rotary function, the model classes in its module, and its form or why it is left alone."""

    classes: tuple[str, ...]
    function: str
    form: str
    patched: bool


def rows() -> list[Row]:
    """A row for every rotary function of the installed transformers."""
    models = Path(str(import_module("transformers").__file__)).parent / "models"
    found = []
    for file in sorted(models.glob("*/modeling_*.py")):
        if re.match("modeling_(tf|flax)_", file.name) or not _DEFINES_ONE.search(file.read_text()):
            continue
        module = import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for site in rotary_functions([module]):
            form = find_form(site.name, site.function)
            patched = not isinstance(form, str)
            name = site.key.removeprefix("transformers.models.")
            text = form if isinstance(form, str) else form[0].name
            found.append(Row(_classes(module), name, text, patched))
    return found


def page(rows: list[Row]) -> str:
    """docs/transformers.md."""
    patched = {name for row in rows if row.patched for name in row.classes}
    classes = {name for row in rows for name in row.classes}
    alone = sorted(
        {f"`{row.function.split('.')[0]}` ({row.form})" for row in rows if not row.patched}
    )
    table = (f"| {', '.join(row.classes)} | `{row.function}` | {_outcome(row)} |" for row in rows)
    return _PAGE.format(
        version=import_module("transformers").__version__,
        patched=len(patched),
        classes=len(classes),
        functions=sum(row.patched for row in rows),
        forms=len({row.form for row in rows if row.patched}),
        alone=f"left alone: {', '.join(alone)}" if alone else "none is left alone",
        table="\n".join(table),
    )


def _outcome(row: Row) -> str:
    return row.form if row.patched else f"left alone: {row.form}"


def _classes(module: ModuleType) -> tuple[str, ...]:
    base = import_module("transformers").PreTrainedModel
    return tuple(
        name
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not name.endswith("PreTrainedModel")
    )
