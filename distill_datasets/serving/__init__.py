"""The student in front of traffic.

server.py       serve(): the embedded server, with OpenAI's protocol beside Tinker's
served.py       the models that it has: the base, students, and each with its prompt
requests.py     bodies of OpenAI's protocol to plain dataclasses
live.py         a request to the engine while it runs
answers.py      what a model drew as bodies of OpenAI's protocol, whole or in chunks
calibration.py  when the student may answer alone, with a guarantee
openai_app.py   the endpoints: keys, refusals, streams, clients that go away
settings.py     how a student is put in front of traffic
stages.py       how much of the traffic a student gets, by which evidence
rollout.py      a rollout's state: stage, evidence, what was spent, and who answers whom
proxy.py        the proxy before teacher and student; exchanges.py: what passes through it
monitor.py      what a rollout shows: Prometheus' numbers, and a page; start.py starts it
watch.py        whether what a release or a student stands on is still there
export.py       export, push: a student leaves, as an adapter or merged
parity.py       whether what left is what was trained, number by number
"""
