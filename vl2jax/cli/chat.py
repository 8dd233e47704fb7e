"""An interactive chat about images, on standard input and output."""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vl2jax.cli.output import Output
from vl2jax.common.errors import UserError
from vl2jax.inference.request import Request
from vl2jax.inference.session import Session
from vl2jax.processing.image import load_image
from vl2jax.processing.prompt import with_placeholders

HELP = """\
  /image PATH   add an image to the next message, at <image> or at the beginning
  /reset        start a new conversation
  /save FILE    save the conversation as JSON, for --messages
  /help         show this text
  /quit         exit, like the end of input (Ctrl-D)
  Ctrl-C        stop the answer; at the prompt, press it twice to exit"""


def say(text: str) -> None:
    """Prints a line to standard error, because standard output is for answers."""
    print(text, file=sys.stderr, flush=True)


class Chat:
    """A conversation, and the images for its next message."""

    def __init__(
        self, session: Session, output: Output, *, system: str | None = None, images: Sequence = ()
    ):
        """
        Args:
          session: session with the checkpoint.
          output: prints the answers.
          system: system message of every conversation; None: none.
          images: paths of images for the first message.

        Raises:
          UserError: an image cannot be read.
        """
        self._session, self._output = session, output
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._history: list[dict[str, Any]] = [*self._system]
        self._images: list[str] = []
        self._saved: set[Path] = set()
        self._interrupted = False  # whether Ctrl-C was pressed since the last message
        for image in images:
            self._add_image(image)

    def run(self) -> None:
        """Reads and answers messages until /quit, the end of input, or Ctrl-C twice."""
        self._session.load()
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):  # Windows does not have it
                import readline  # noqa: F401  # adds line editing and a history to `input`
        say("ask about images; /help lists the commands")
        while True:
            try:
                line = self._read_line()
                if line == "/quit":
                    return
                self._handle(line)
            except EOFError:
                return
            except BrokenPipeError:
                raise
            except (UserError, OSError) as error:
                say(f"error: {error}")

    def _read_line(self) -> str:
        is_person = sys.stdin.isatty()
        try:
            line = input("> " if is_person and sys.stdout.isatty() else "").strip()
            self._interrupted = False
            return line
        except KeyboardInterrupt:
            if self._interrupted or not is_person:
                raise
            self._interrupted = True
            say("\npress Ctrl-C again to exit")
            return ""
        except UnicodeDecodeError as error:
            raise UserError(f"the input is not valid {error.encoding} text") from error

    def _handle(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if line and not line.startswith("/"):
            self._ask(line)
        elif command == "/image":
            self._add_image(argument.strip().strip("'\""))
        elif command == "/save":
            self._save(argument.strip())
        elif line == "/reset":
            self._history, self._images = [*self._system], []
            say("started a new conversation")
        elif line == "/help":
            say(HELP)
        elif line:
            raise UserError(f"unknown command {line!r:.60}; /help lists the commands")

    def _add_image(self, path: str) -> None:
        if not path:
            raise UserError("/image needs the path of an image")
        path = os.path.abspath(os.path.expanduser(path))
        picture = load_image(path, exif=self._session.exif)
        self._images.append(path)
        say(f"{path}: {picture.width} x {picture.height} pixels, for the next message")

    def _ask(self, text: str) -> None:
        token = self._session.processor.tokenizer.image_token
        content = with_placeholders(text, len(self._images), token)
        question = {"role": "user", "content": content, "images": self._images}
        asked = [*self._history, question]
        sample = self._session.prepare(Request(asked))
        shown: list[str] = []

        def show(fresh: str) -> None:
            shown.append(fresh)
            self._output.show(fresh)

        try:
            generation = self._session.answer(sample, show)
            self._output.finish(generation, sample)
        except KeyboardInterrupt:
            self._interrupted = True
            self._output.interrupt()
            say("stopped")
            if not any(shown):  # without an answer, the question is not added to the conversation
                return
        # The model may generate the placeholder, but only questions have images.
        answer = "".join(shown).replace(token, "")
        self._history = [*asked, {"role": "assistant", "content": answer}]
        self._images = []

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs the path of a file to write")
        path = Path(name).expanduser().absolute()
        if path.exists() and path not in self._saved:
            raise UserError(f"{path} exists; choose another name")
        text = json.dumps({"messages": self._history}, ensure_ascii=False, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
        self._saved.add(path)
        say(f"saved {len(self._history)} messages: {path}")
