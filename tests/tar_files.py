"""Tar shards, made by `tarfile`, for tests."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def picture(number, kind="PNG", size=(56, 84)):
    """An encoded image of (height, width) pixels, another for each number."""
    rng = np.random.default_rng(number)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """Write a tar file of (name, bytes, or a `TarInfo`'s attributes as a dict, or a dict as JSON) and return its
    path."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, dict) and "type" in content:
                for attribute, value in content.items():
                    setattr(info, attribute, value)
                content = b""
            elif isinstance(content, dict | list):
                content = json.dumps(content).encode()
            if info.type == tarfile.REGTYPE:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def chat(question="<image>What?", answer="That.", **more):
    """A row with one turn each."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def captions(numbers):
    """Samples with an image and a row each, for `write_tar`."""
    for number in numbers:
        yield f"{number:04d}.png", picture(number)
        yield f"{number:04d}.json", chat(answer=f"{number % 7} and {number % 3}")
