"""The command line. `vlmcourse COMMAND --help` lists a command's options: they are the arguments of the function behind it."""
import argparse
import importlib
import inspect
import json
import os
import re
import sys
from typing import get_args

COMMANDS = {                    # command: (module, function)
    "check": ("formats", "check_records"),
    "convert": ("trainers", "convert"),
    "cvat_to_qwenvl": ("splits", "cvat_to_qwenvl"),
    "dpo": ("dpo", "train"),
    "evaluate": ("report", "evaluate_file"),
    "grpo": ("grpo", "train"),
    "grpo_trl": ("grpo_trl", "train"),
    "log": ("logs", "show_log"),
    "preflight": ("preflight", "check_run"),
    "pretrain": ("tiny", "pretrain"),
    "sft": ("sft", "train"),
}
FAULTS = {"check": lambda report: report.problems, "preflight": lambda report: not report.ok}  # these make the exit code 1
WORDS = {"true": True, "false": False, "none": None}


def load(command):
    "The function behind a command."
    module, name = COMMANDS[command]
    return getattr(importlib.import_module(f"vlmcourse.{module}"), name)


def usage():
    "What to type."
    return "usage: vlmcourse COMMAND [options]\n\ncommands:\n" + "".join(
        f"  {name:14} vlmcourse.{module}.{function}\n" for name, (module, function) in COMMANDS.items()
    ) + "\n`vlmcourse COMMAND --help` lists the options of a command."


def reader(kind, usual):
    "How a word is read for an argument of this annotation; `usual`: fastcore's way, to which every text is True and none is None."
    from fastcore.script import str2bool
    kinds = get_args(kind)                                                  # of a union, such as bool | None

    def read(word):
        if type(None) in kinds and word.lower() == "none":
            return None
        if dict in kinds:
            return dict(json.loads(word))
        return str2bool(word) if bool in kinds else usual(word)

    def checked(word):
        try:
            return read(word)
        except (TypeError, ValueError):
            names = ["JSON, such as '{\"a\": 1}'" if k is dict else {type(None): "None", bool: "True, False"}.get(k, k.__name__) for k in kinds]
            raise argparse.ArgumentTypeError(f"{word!r} cannot be read; give {', '.join(names)}") from None

    return checked if kinds else lambda word: WORDS.get(word.lower(), word)


def options(command, words):
    "The function's arguments, from the words typed; --output-dir and --output_dir mean the same, and so do `data` and `--data data`."
    from fastcore.docments import docments
    from fastcore.script import anno_parser
    parser = anno_parser(load(command), prog=f"vlmcourse {command}")
    bare = {name for name, p in inspect.signature(load(command)).parameters.items() if p.annotation is p.empty}     # such as plot="auto"
    kinds = {name: None if name in bare else found.anno for name, found in docments(load(command), full=True, returns=False, eval_str=True).items()}
    for action in parser._actions:
        if action.option_strings and action.dest in kinds and (action.dest in bare or get_args(kinds[action.dest])):
            action.type = reader(kinds[action.dest], action.type)
    known = {"--" + a.dest.replace("_", "-"): "--" + a.dest for a in parser._actions} | {o: o for a in parser._actions for o in a.option_strings}
    words = [re.sub(r"^--[^=]+", lambda m: known.get(m[0], m[0]), w) for w in words]
    for action in [a for a in parser._actions if not a.option_strings]:     # needed arguments, by place or by name
        for i, word in reversed(list(enumerate(words))):
            name, _, value = word.partition("=")
            if name == f"--{action.dest}" and (value or i + 1 < len(words)):
                action.nargs, action.default = "?", value or words.pop(i + 1)
                words.pop(i)
    found = vars(parser.parse_args(words))
    return {k: v for k, v in found.items() if k not in ("pdb", "xtra")}


def main(words=None):
    "Run one command and return the exit code. A reader that stops early (`vlmcourse check … | head`) is no mistake."
    try:
        try:
            return run(sys.argv[1:] if words is None else list(words))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def why(error):
    "What to tell; an error of the operating system about a file knows only the file and what happened."
    if not isinstance(error, OSError) or error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename} cannot be read or written ({error.strerror}). Check the path, the rights, and the room on the disk."


def run(words):
    "A mistake of the user is one paragraph and exit code 2, not a traceback; 1: a check was made and found faults."
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] not in COMMANDS:
        print(f"vlmcourse: there is no command {words[0]!r}.\n\n{usage()}", file=sys.stderr)
        return 2
    given = options(words[0], words[1:])
    try:
        result = load(words[0])(**given)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"vlmcourse {words[0]}: {why(error)}", file=sys.stderr)
        return 2
    if result is not None and not isinstance(result, dict):
        print(result)
    return int(words[0] in FAULTS and bool(FAULTS[words[0]](result)))


if __name__ == "__main__":
    sys.exit(main())
