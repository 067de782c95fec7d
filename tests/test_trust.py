"""What others made runs no code: no modules that a data set names, no programs for images or of a git configuration."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

import cnnlib
from cnnlib.cli.main import main
from cnnlib.data import image_folder
from cnnlib.data.declaration import Data
from cnnlib.data.image_folder import from_arrays, from_folder
from cnnlib.data.sets import Split, load, open_splits
from cnnlib.data.tfds import import_tfds, quiet
from cnnlib.errors import UserError
from cnnlib.system import provenance

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A file that is there once Pillow has started Ghostscript, which in truth is a script."""
    folder, ran = tmp_path / "bin", tmp_path / "ghostscript-ran"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\ntouch '{ran}'\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return ran


def black(count):
    return Split(np.zeros((count, 4, 4, 3), np.uint8), np.zeros(count, np.int32))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A whole data set, `mine`."""
    root = tmp_path_factory.mktemp("prepared")
    from_arrays("mine", root, black(3), black(2), ["all"])
    return root


FOREIGN = {"pythonClassName": "mine.evil.Evil", "jsonFeature": {"json": "{}"}}
FEATURES = "tensorflow_datasets.core.features.features_dict.FeaturesDict"


def named_inside(features):
    features["featuresDict"]["features"]["more"] = FOREIGN


def named_at_the_top(features):
    features["pythonClassName"] = FOREIGN["pythonClassName"]


def named_as_earlier_versions_do(features):
    features.clear()
    features.update(type=FEATURES, content={"more": {"type": "mine.evil.Evil", "content": {}}})


def named_in_a_text(features):
    inner = {"more": {"type": "mine.evil.Evil", "content": {}}}
    del features["featuresDict"]
    features["jsonFeature"] = {"json": json.dumps(inner)}


def named_under_another_spelling(features):
    features["featuresDict"]["features"]["more"] = {"python_class_name": "mine.evil.Evil", "json_feature": {"json": ""}}


NAMED = [
    named_inside,
    named_at_the_top,
    named_as_earlier_versions_do,
    named_in_a_text,
    named_under_another_spelling,
]


def plant(prepared, folder, change, file="features.json"):
    """Copies the data set beside a module, `mine.evil`, that leaves `ran`, and lets a file of the set name it."""
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    (folder / "mine" / "evil.py").write_text(f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\n")
    version = folder / "mine" / "1.0.0"
    features = json.loads((version / "features.json").read_text())
    change(features)
    if file == "features.json":
        (version / file).write_text(json.dumps(features))
    else:
        (version / file).write_text(json.dumps(json.loads((version / file).read_text()) | {"features": features}))
    return folder / "ran"


def forget_the_module():
    for name in ("mine", "mine.evil"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("change", "file"),
    [*((change, "features.json") for change in NAMED), (named_inside, "dataset_info.json")],
)
def test_a_module_that_a_data_set_names_is_not_run(prepared, tmp_path, monkeypatch, capsys, change, file):
    ran = plant(prepared, tmp_path, change, file)
    monkeypatch.syspath_prepend(tmp_path)  # as `cnnlib` does with the current folder
    try:
        status = main(["show", "fc_vs_conv", "data.name=mine", f"data.data_dir={tmp_path}"])
    finally:
        forget_the_module()
    assert not ran.exists()
    told = capsys.readouterr().err
    assert status == 2 and len(told.splitlines()) == 1
    assert told.startswith("error: mine cannot be read: its files name the class mine.evil.Evil")


@pytest.mark.slow
def test_the_command_in_the_folder_of_a_data_set_runs_nothing_of_it(prepared, tmp_path):
    ran = plant(prepared, tmp_path, named_inside)
    command = [sys.executable, "-m", "cnnlib", "show", "fc_vs_conv", "data.name=mine", "data.data_dir=."]
    path = {"PYTHONPATH": str(Path(cnnlib.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **path}, capture_output=True, text=True)
    assert not ran.exists()
    assert done.returncode == 2 and "its files name the class mine.evil.Evil" in done.stderr


def test_a_set_that_is_opened_again_by_its_folder_is_looked_at_again(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    opened = open_splits(Data("mine", data_dir=str(tmp_path)))
    source = opened.test
    source.__setstate__(source.__getstate__())  # as another process has it, which reads the files anew
    ran = plant(prepared, tmp_path, named_inside)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(UserError) as error:
            source.read(np.array([0]))
    finally:
        forget_the_module()
    assert not ran.exists() and "its files name the class mine.evil.Evil" in str(error.value)


@pytest.mark.parametrize("name", ["huggingface:mine", "kaggle:mine"])
def test_data_sets_of_a_namespace_which_bring_their_own_code_are_not_known(name, monkeypatch):
    import tensorflow_datasets as tfds

    asked = []
    # Both fetch the code of the set, or find it in the current folder, and run it.
    hub = tfds.core.dataset_builders.huggingface_dataset_builder
    monkeypatch.setattr(hub, "builder", lambda **given: asked.append("hub"))
    monkeypatch.setattr(tfds.core.community, "community_register", lambda: asked.append("register"))
    with contextlib.suppress(Exception):
        load(Data(name))
    assert not asked
    with pytest.raises(UserError, match=rf"data\.name={name}: data sets of a namespace"):
        load(Data(name))


def test_an_image_that_is_none_starts_no_program(ghostscript, tmp_path):
    for part in ("train", "test"):
        (tmp_path / "images" / part / "a").mkdir(parents=True)
        (tmp_path / "images" / part / "a" / "0.png").write_bytes(EPS)
    with pytest.raises(UserError, match=r"0\.png is no image"):
        from_folder(tmp_path / "images", "mine", tmp_path / "tfds")
    assert not ghostscript.exists()


def test_an_image_of_a_prepared_set_that_is_none_starts_no_program(ghostscript, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_folder, "png", lambda pixels: io.BytesIO(EPS))
    from_arrays("mine", tmp_path, black(3), black(2), ["all"])
    data = Data("mine", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="mine cannot be read: an image has none of the formats PNG"):
        load(data)
    assert not ghostscript.exists()
    with pytest.raises(UserError, match="mine cannot be read: an image has none of the formats PNG"):
        open_splits(data)
    assert not ghostscript.exists()


def test_what_lies_beside_the_image_is_not_decoded(ghostscript, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    white = io.BytesIO()
    Image.new("RGB", (4, 4), "white").save(white, "png")

    with tfds.core.registered.skip_registration():

        class Mine(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = tmp_path

            def _info(self):
                image, label = tfds.features.Image(shape=(4, 4, 3)), tfds.features.ClassLabel(num_classes=1)
                features = {
                    "image": image,
                    "label": label,
                    "preview": tfds.features.Image(shape=(4, 4, 3)),
                    "film": tfds.features.Sequence(tfds.features.Image(shape=(4, 4, 3))),
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
                )

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(3), "test": self._generate_examples(2)}

            def _generate_examples(self, count):
                for index in range(count):
                    yield index, {"image": white.getvalue(), "label": 0, "preview": EPS, "film": [EPS]}

    Mine(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    data = Data("mine", data_dir=str(tmp_path))
    assert (load(data).test.x == 255).all()
    opened = open_splits(data)
    assert (opened.test.read(np.array([1])).x == 255).all() and opened.train.labels().tolist() == [0, 0, 0]
    assert not ghostscript.exists()


@pytest.mark.parametrize("file_type", ["png RGB", "png L", "jpeg RGB", "bmp RGB", "gif L"])
def test_images_are_decoded_as_tfds_decodes_them(file_type, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kind, mode = file_type.split()
    pixels = np.random.RandomState(0).randint(0, 256, (4, 4, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    monkeypatch.setattr(image_folder, "png", lambda pixels: io.BytesIO(file.getvalue()))
    made = from_arrays("mine", tmp_path, black(3), black(2), ["all"])
    with quiet():
        expected = import_tfds().builder_from_directory(made).as_data_source("test")[0]["image"]
    np.testing.assert_array_equal(load(Data("mine", data_dir=str(tmp_path))).test.x, [expected] * 2)


@pytest.mark.parametrize("setting", ["diff.external", "diff.python.textconv", "core.fsmonitor"])
def test_the_diff_is_taken_without_the_programs_of_git_s_configuration(setting, tmp_path, monkeypatch):
    package, ran, script = tmp_path / "checkout", tmp_path / "ran", tmp_path / "script"
    package.mkdir()
    script.write_text(f"#!/bin/sh\ntouch '{ran}'\necho by a program\n")
    script.chmod(0o755)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)

    def git(*arguments):
        identity = ("-c", "user.name=name", "-c", "user.email=address")
        subprocess.run(["git", *identity, *arguments], cwd=package, check=True, capture_output=True)

    git("init")
    (package / "__init__.py").write_text("before\n")
    (package / ".gitattributes").write_text("*.py diff=python\n")
    git("add", ".")
    git("commit", "-m", "first")
    (package / "__init__.py").write_text("after\n")
    git("config", "color.ui", "always")
    git("config", setting, str(script))
    monkeypatch.setattr(cnnlib, "__file__", str(package / "__init__.py"))
    assert provenance.commit().endswith("-dirty")
    told = provenance.diff()
    assert not ran.exists()
    assert "-before\n+after\n" in told and "\x1b" not in told
