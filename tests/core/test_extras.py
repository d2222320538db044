"""What is not installed is asked for in one line."""

import os

from conftest import run_script


def test_without_lightning_the_script_says_what_to_install(tmp_path):
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "lightning.py").write_text("raise ImportError('not here')\n")
    env = {"PYTHONPATH": f"{shadow}{os.pathsep}{os.environ['PYTHONPATH']}"}
    done = run_script(script="dqn_lightning", cwd=tmp_path, env=env, check=2)
    assert done.stderr == 'error: PyTorch Lightning is not installed: pip install -e ".[lightning]"\n'
    assert [path.name for path in tmp_path.iterdir()] == ["shadow"]
