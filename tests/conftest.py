"Ctrl-C reaches the tests' own processes also when pytest runs in the background (`pytest &` makes them ignore it)."
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
