"""`troupe topics`: the list of MQTT topics, as text and as JSON."""

import json

from click.testing import CliRunner

from runtime.api.mqtt.messages import reference
from runtime.cli.topics import topics


def test_the_text_has_every_topic() -> None:
    output = CliRunner().invoke(topics, env={"COLUMNS": "200"}).stdout
    assert all(info.topic in output for info in reference("main"))


def test_the_json_has_every_topic_with_its_schema() -> None:
    listed = json.loads(CliRunner().invoke(topics, ["--json"]).stdout)
    assert list(listed) == [info.topic for info in reference("main")]
    submit = listed["troupe/main/jobs/submit"]
    assert (submit["direction"], submit["qos"], submit["retained"]) == ("in", 1, False)
    assert "problem" in submit["schema"]["properties"]
