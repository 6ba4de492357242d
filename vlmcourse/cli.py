"""The command line. `vlmcourse COMMAND --help` lists a command's options: they are the arguments of the function behind it."""
import importlib
import re
import sys

COMMANDS = {                    # command: (module, function)
    "pretrain": ("tiny", "pretrain"),
    "sft": ("sft", "train"),
}


def load(command):
    "The function behind a command."
    module, name = COMMANDS[command]
    return getattr(importlib.import_module(f"vlmcourse.{module}"), name)


def usage():
    "What to type."
    return "usage: vlmcourse COMMAND [options]\n\ncommands:\n" + "".join(
        f"  {name:10} vlmcourse.{module}.{function}\n" for name, (module, function) in COMMANDS.items()
    ) + "\n`vlmcourse COMMAND --help` lists the options of a command."


def options(command, words):
    "The function's arguments, from the words typed; --output-dir and --output_dir mean the same."
    from fastcore.script import anno_parser
    parser = anno_parser(load(command), prog=f"vlmcourse {command}")
    words = [re.sub(r"^--[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), w) for w in words]
    found = vars(parser.parse_args(words))
    return {k: v for k, v in found.items() if k not in ("pdb", "xtra")}


def main(words=None):
    "Run one command; a mistake of the user is one paragraph and exit code 2, not a traceback."
    words = sys.argv[1:] if words is None else list(words)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] not in COMMANDS:
        print(f"vlmcourse: there is no command {words[0]!r}.\n\n{usage()}", file=sys.stderr)
        return 2
    given = options(words[0], words[1:])
    try:
        result = load(words[0])(**given)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"vlmcourse {words[0]}: {error}", file=sys.stderr)
        return 2
    if result is not None and not isinstance(result, dict):
        print(result)
    return 0
