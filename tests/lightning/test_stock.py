"""`stock.py` is the only file with private names of Lightning, and Lightning still has all of them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import azure_torch_ckpt.lightning
from azure_torch_ckpt.lightning import stock
from tests.support.trainers import Namespace

FOLDER = Path(azure_torch_ckpt.lightning.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def defined(path: Path) -> Iterator[str]:
    """Names of methods, functions and attributes that a file defines."""
    for node in nodes(path):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_private_names_of_lightning_are_used_in_one_file() -> None:
    ours = {name for path in FILES if path.name != "stock.py" for name in defined(path)}
    foreign = {
        f"{path.name}: {node.attr}"
        for path in FILES
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and private(node.attr) and path.name != "stock.py" and node.attr not in ours
    }
    assert not foreign


def test_private_methods_that_are_overridden_are_listed(space: Namespace) -> None:
    """Lightning would not call an override of a method that it has renamed, and no error would say so."""
    stock = space.module("stock")
    modules = [space.module(name) for name in ("checkpoint_io", "cli", "fabric", "model_checkpoint", "strategies")]
    classes = [one for module in modules for one in vars(module).values() if inspect.isclass(one)]
    overridden = {
        name
        for one in classes
        if one.__module__.startswith("azure_torch_ckpt.")
        for name in filter(private, vars(one))
        if any(name in vars(base) for base in one.__mro__[1:] if "lightning" in base.__module__.partition(".")[0])
    }
    listed = set(stock.OVERRIDES)
    # Python's own table, and the parts of abstract base classes.
    assert {name for name in overridden if not name.startswith("_abc_")} - listed == set()
    for name, owner in stock.OVERRIDES.items():
        since_2_6 = isinstance(owner, str)
        owner = getattr(space.pl.cli, owner) if since_2_6 else owner
        assert callable(getattr(owner, name, None)) or (since_2_6 and not stock.LOAD_TAKES_WEIGHTS_ONLY), name


def private_names_in_stock() -> set[str]:
    tree = ast.parse((FOLDER / "stock.py").read_text(encoding="utf-8"))
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and private(node.attr)}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return attributes | {text for text in texts if re.fullmatch(r"_[a-z_]+", text)}


# Lightning 2.5 has no `save_on_exception`; Neptune's logger is gone in 2.6.
NEW_IN_2_6 = {"_should_save_on_exception", "_parse_ckpt_path"}
GONE_IN_2_6 = {"_log_model_checkpoints"}


def test_lightning_has_the_private_names(space: Namespace) -> None:
    pytorch = space.pl
    owners: list[Any] = [
        pytorch.callbacks.ModelCheckpoint,
        pytorch.strategies.Strategy,
        pytorch.strategies.FSDPStrategy,
        pytorch.strategies.ModelParallelStrategy,
        importlib.import_module(f"{space.fabric.__name__}.strategies.fsdp"),
        importlib.import_module(f"{pytorch.__name__}.plugins.io.wrapper"),
        importlib.import_module(f"{pytorch.__name__}.loggers.wandb"),
        importlib.import_module(f"{pytorch.__name__}.cli"),
    ]
    sources = "\n".join(inspect.getsource(owner) for owner in owners)
    missing = {name for name in private_names_in_stock() if not re.search(rf"\b{name}\b", sources)}
    assert missing <= (GONE_IN_2_6 if stock.LOAD_TAKES_WEIGHTS_ONLY else NEW_IN_2_6)


@pytest.mark.parametrize("given", [None, True, False])
def test_weights_only_means_what_it_means_to_lightning(given: bool | None) -> None:
    has_it = "weights_only" in inspect.signature(stock.TorchCheckpointIO.load_checkpoint).parameters
    assert has_it == stock.LOAD_TAKES_WEIGHTS_ONLY
    assert stock.weights_only_argument(given) == ({"weights_only": given} if has_it else {})
    assert stock.default_weights_only(given) == (given if has_it else bool(given))
