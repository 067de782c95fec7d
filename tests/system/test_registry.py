from __future__ import annotations

import pytest

from cnnlib.errors import UserError
from cnnlib.system.registry import Registry

pytestmark = pytest.mark.once


def test_a_name_is_declared_once():
    things = Registry("thing")

    @things.register
    def one() -> int:
        return 1

    assert things.get("one") == 1 and list(things) == ["one"] and "one" in things
    with pytest.raises(ValueError, match="declared twice"):
        things.register(one)


def test_an_unknown_name_lists_what_exists():
    things = Registry("thing")
    things.register(lambda: 0)
    with pytest.raises(UserError, match="no thing 'two'; there are: <lambda>"):
        things.get("two")
