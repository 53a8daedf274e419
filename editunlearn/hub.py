"""Uploads to the Hugging Face hub, through ``huggingface_hub`` alone: private unless told otherwise."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.errors import HubError, InputError

if TYPE_CHECKING:
    from editunlearn.deltas.manifest import BaseManifest

WHAT = {
    "merged": "the edited model",
    "lora": "the edit as a LoRA adapter",
    "delta": "the edit",
    "standalone": "the model with its memory",
}
"""What each kind of export is called in the message of its commit."""


@dataclass(frozen=True)
class Push:
    """An upload that was asked for.

    Attributes:
        repo: ``OWNER/NAME`` of a model repository.
        public: whether everybody may read it.
    """

    repo: str
    public: bool = False

    @property
    def seen_by(self) -> str:
        """Who may read it, in a word."""
        return "public" if self.public else "private"

    def check(self, kind: str, made: Sequence[BaseManifest]) -> list[str]:
        """Look at everything that needs no network; what its owner should think about before it is public.

        Args:
            kind: of the export, one of ``WHAT``.
            made: manifests of the deltas in it.

        Raises:
            InputError: the name is none, nobody is logged in, or the texts of the facts would become public.
        """
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        problems = []
        try:
            validate_repo_id(self.repo)
            named = self.repo.count("/") == 1
        except HFValidationError:
            named = False
        if not named:
            problems.append(f"--push {self.repo}: write OWNER/NAME: letters, digits, '-', '_' and '.', at most 96.")
        if get_token() is None:
            problems.append(f"--push {self.repo}: nobody is logged in. Run hf auth login, or set HF_TOKEN.")
        if self.public and any(part.text for one in made for part in one.facts):
            problems.append(
                f"--push {self.repo} --public: the texts of the facts are stored in this delta (--store-facts) and "
                "would be published with it. Leave --public out, or make the delta without --store-facts."
            )
        if problems:
            raise InputError(problems)
        if self.public and kind == "standalone":
            return ["--to standalone --public: the weights beside the memory still know what was forgotten"]
        if self.public and kind != "merged":
            return [
                f"--to {kind} --public: the base model and {WHAT[kind]} give what was forgotten back by subtraction; "
                "publish merged weights only"
            ]
        return []

    def check_there(self) -> None:
        """Ask the hub whether this may be uploaded; before the work, so that it is not done for nothing.

        Raises:
            InputError: the repository is there, and public when it should be private.
            HubError: the hub cannot be reached, or refuses the token.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        api = HfApi()
        with _told(self.repo):
            api.whoami()
            try:
                there: Any = api.repo_info(self.repo)
            except RepositoryNotFoundError:
                return
        if not there.private and not self.public:
            raise InputError(
                f"--push {self.repo}: this repository is there already, and public. Choose another name, or say "
                "--public."
            )

    def send(self, folder: Path, kind: str) -> str:
        """Upload a folder; its address.

        Raises:
            HubError: the upload failed; the message says how to repeat it alone.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        again = ["hf", "upload", self.repo, str(folder), ".", *([] if self.public else ["--private"])]
        with _told(self.repo, again):
            where = api.create_repo(self.repo, private=not self.public, exist_ok=True)
            api.upload_folder(repo_id=self.repo, folder_path=folder, commit_message=f"Add {WHAT[kind]} (editunlearn)")
        return str(where)


@contextmanager
def _told(repo: str, again: Sequence[str] = ()) -> Iterator[None]:
    """Errors of the network and of the hub become ours, in one line."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever client it uses

    try:
        yield
    except (HTTPError, OSError) as error:
        first = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        hint = f" What was written stays; to upload it: {shlex.join(again)}" if again else ""
        raise HubError(f"--push {repo}: {first}.{hint}") from error
