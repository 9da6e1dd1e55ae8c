"""The student in front of traffic.

server.py       serve(): the embedded server, with OpenAI's protocol beside Tinker's
protocol.py     that protocol: bodies read as plain dataclasses, and what a proxy passes on
answers.py      what the engine draws while a request runs, as bodies, whole or in chunks
settings.py     how a student is served and put in front of traffic
calibration.py  when the student may answer alone, with a guarantee
rollout.py      how much of the traffic a student gets: stages, evidence, and the state on disk
proxy.py        the proxy before teacher and student, with Prometheus' numbers and a page
start.py        starts the proxy, and moves a running one to another stage
watch.py        whether what a release or a student stands on is still there
export.py       export, push: a student leaves, as an adapter or merged
parity.py       whether what left is what was trained, number by number
"""
