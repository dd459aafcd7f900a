"""How `make test` shares the tests between its two workers: by folder."""

import pytest
from xdist.scheduler import LoadScopeScheduling

LONGEST = ("launch", "rollout", "e2e", "distributed", "conversion")
"""Folders that begin first, so that no worker is left with a long one at the end."""


class ByFolder(LoadScopeScheduling):
    """The tests of a folder share servers, ranks and references, and therefore a worker."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.split("/")[1]


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFolder:
    return ByFolder(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.nodeid.split("/")[1]
        return (*LONGEST, folder).index(folder)

    items.sort(key=place)
