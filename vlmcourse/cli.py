"""The command line. `vlmcourse COMMAND --help` lists a command's options: they are the arguments of the function behind it."""
import importlib
import os
import re
import sys

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


def load(command):
    "The function behind a command."
    module, name = COMMANDS[command]
    return getattr(importlib.import_module(f"vlmcourse.{module}"), name)


def usage():
    "What to type."
    return "usage: vlmcourse COMMAND [options]\n\ncommands:\n" + "".join(
        f"  {name:14} vlmcourse.{module}.{function}\n" for name, (module, function) in COMMANDS.items()
    ) + "\n`vlmcourse COMMAND --help` lists the options of a command."


def options(command, words):
    "The function's arguments, from the words typed; --output-dir and --output_dir mean the same, and so do `data` and `--data data`."
    from fastcore.script import anno_parser
    parser = anno_parser(load(command), prog=f"vlmcourse {command}")
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


def run(words):
    "A mistake of the user is one paragraph and exit code 2, not a traceback."
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


if __name__ == "__main__":
    sys.exit(main())
