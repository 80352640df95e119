"""Talking points for doctors from patient events: a job with templates, defaults, functions and a JSON answer.

A document looks like this::

    {"ai_status": "pending", "event_type": "visit", "notes": [{"text": "..."}], "medication": ["..."],
     "patient_details": {"first_name": "...", "date_of_birth": "1961-03-07"}}

python cli.py openai-batch run --schema schema_examples/medical_schema.py --db-name clinic --source-collection events
"""

from typing import Any

from openai_batch import DocumentFields, OpenAIConfig, PromptConfig, SchemaConfig, StatusConfig

medical_schema_config = SchemaConfig(
    status=StatusConfig(field_name="ai_status"),
    response_field="event_response",
    response_content_field="talking_points",
    response_date_field="created_date",
    query_template={"event_type": {"$in": ["visit", "lab_result"]}},
    update_template={"$unset": {"needs_preparation": ""}},
)


def year(date_of_birth: str) -> str:
    """Return the year only: a prompt does not need the day of birth."""
    return date_of_birth[:4]


document_fields = DocumentFields(
    field_map={
        "patient_name": "patient_details.first_name",
        "born": "patient_details.date_of_birth",
        "event": "event_type",
        "note": "notes.0.text",
        "medication": "medication",
    },
    defaults={"medication": []},
    preprocess_functions={"born": year},
    masked=frozenset({"patient_name"}),
)

prompt_config = PromptConfig(
    system_prompt="You prepare short talking points for a doctor. Answer with JSON only.",
    user_prompt_template="""\
Patient {{ patient_name }}, born in {{ born }}, event: {{ event }}.
Note: {{ note }}
{% if medication %}Medication: {{ medication | join(", ") }}{% else %}No medication.{% endif %}
""",
)

openai_config = OpenAIConfig(
    temperature=0.1,
    max_tokens=500,
    response_format={
        "type": "json_schema",
        "json_schema": {
            "name": "talking_points",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {
                    "points": {"type": "array", "items": {"type": "string"}},
                    "urgency": {"type": "string", "enum": ["routine", "soon", "now"]},
                },
                "required": ["points", "urgency"],
                "additionalProperties": False,
            },
        },
    },
)


def response_processor(response: Any, document: dict[str, Any]) -> dict[str, Any]:
    """Return the value to store below ``event_response.talking_points``; *response* is the parsed JSON."""
    return {"points": response["points"], "urgency": response["urgency"], "event": document["event_type"]}
