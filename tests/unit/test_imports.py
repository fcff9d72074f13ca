"""The package imports nothing before it is used, and a command line that is stopped before it begins says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import diffusionblocks as db


def printed(code: str) -> str:
    """What Python code prints, in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_package_is_light_until_it_is_used() -> None:
    code = "import sys, diffusionblocks, diffusionblocks.__main__; print('torch' in sys.modules)"
    assert printed(code) == "False\n"


def test_help_imports_neither_torch_nor_models() -> None:
    code = (
        "import contextlib, io, sys\n"
        "from diffusionblocks.cli import main\n"
        "for command in ('', 'train', 'evaluate', 'sample', 'inspect', 'plan', 'compare', 'ablate', 'branch', "
        "'merge'):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:\n"
        "        main([*command.split(), '--help'])\n"
        "    assert 'usage: diffusionblocks' in shown.getvalue()\n"
        "print({'torch', 'transformers', 'diffusers'} & set(sys.modules))\n"
    )
    assert printed(code) == "set()\n"


def test_commands_that_need_no_model_import_no_library_of_models() -> None:
    code = (
        "import contextlib, io, sys\n"
        "from diffusionblocks.cli import main\n"
        "for arguments in (['recipes'], ['recipes', 'vit/digits']):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as shown:\n"
        "        assert main(arguments) == 0\n"
        "    assert shown.getvalue()\n"
        "print({'torch', 'transformers', 'diffusers'} & set(sys.modules))\n"
    )
    assert printed(code) == "set()\n"


def test_conversion_imports_torch_and_no_other_large_library() -> None:
    large = ["transformers", "diffusers", "datasets", "sklearn", "matplotlib", "huggingface_hub", "torch._dynamo"]
    code = (
        "import sys, diffusionblocks as db; db.convert, db.load, db.DiffusionBlocks, db.register_family\n"
        f"print([name for name in {[*large, 'torch']!r} if name in sys.modules])"
    )
    assert printed(code) == "['torch']\n"


def test_only_what_is_public_is_seen() -> None:
    assert {name for name in dir(db) if not name.startswith("__")} == set(db.__all__) - {"__version__"}
    assert all(getattr(db, name) is not None for name in db.__all__)
    assert callable(db.convert)
    assert not hasattr(db, "nothing")


def test_a_command_line_that_is_stopped_while_it_imports_says_so() -> None:
    # The hook stops the import of torch for longer than the test: the signal always finds it there.
    code = (
        "import sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print('importing', flush=True)\n"
        "            time.sleep(60)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "from diffusionblocks.__main__ import main\n"
        "sys.exit(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "inspect", "recipe.yaml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error == "stopped by SIGINT\n"
