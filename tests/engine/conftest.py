from collections.abc import Callable

import pytest
import tiny_models


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Returns the folder of a tiny model by its name."""
    folders: dict[str, str] = {}

    def folder_of(name: str) -> str:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            tiny_models.save(name, folder)
            folders[name] = str(folder)
        return folders[name]

    return folder_of
