"""A small random model, and what a command that ends with an error says."""

import pytest
from tiny import save_cosa


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A directory with a small random model of the shapes' classes."""
    return save_cosa(tmp_path_factory.mktemp("model"), 64)


@pytest.fixture
def complaint(capsys):
    """What the `main` of a command says where it ends with an error."""

    def complaint(main, *arguments):
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments)])
        return f"{stopped.value.code}{capsys.readouterr().err}"

    return complaint
