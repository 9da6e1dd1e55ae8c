"""The student in front of traffic.

server.py       serve(): the embedded server, with OpenAI's protocol beside Tinker's
served.py       the models that it has: the base, students, and each with its prompt
requests.py     bodies of OpenAI's protocol to plain dataclasses
live.py         a request to the engine while it runs
answers.py      what a model drew as bodies of OpenAI's protocol, whole or in chunks
calibration.py  when the student may answer alone, with a guarantee
openai_app.py   the endpoints: keys, refusals, streams, clients that go away
watch.py        whether what a release or a student stands on is still there
"""
