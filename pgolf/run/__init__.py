"""The record of one run: what it writes, whatever happens to it.

entry           how the two programs begin and end
figures         the drawings of the report
folder          the folder of one run, held by it alone
log             what a run tells on its way
record          settings, log, metrics, summary, and how a run ends
report          the page that it leaves behind
saved_settings  settings.json
"""
