# SPDX-License-Identifier: GPL-2.0-or-later
"""The series as files; that they apply, build and please checkpatch is `qvis patches check`."""

from __future__ import annotations

import re
from email.parser import BytesParser

import pytest

from qvis.build import series

COMPONENTS = ["qemu", "linux"]


@pytest.mark.parametrize("component", COMPONENTS)
def test_folder_and_series_file_agree(component: str) -> None:
    listed = [patch.name for patch in series.read(component)]
    assert listed == sorted(path.name for path in series.folder(component).glob("*.patch"))
    assert listed


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_patch_argues_and_is_signed(component: str) -> None:
    for patch in series.read(component):
        mail = BytesParser().parsebytes(patch.content)
        message = str(mail.get_payload()).split("\n---\n")[0]
        assert mail["From"] == "qvis developers <developers@qvis.invalid>"
        assert f"Signed-off-by: {mail['From']}" in message
        argument = message.split("Signed-off-by")[0]
        assert len(argument.split()) >= 20, f"{patch.name} says too little"
        assert re.match(r"[\w/:, .-]+: \S", patch.subject), patch.subject
