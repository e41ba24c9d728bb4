"""One right record of each format of preferences."""

from __future__ import annotations

from rlhf_trainer.data.formats import Options
from rlhf_trainer.models.from_scratch import build_tokenizer

PROMPTED = {"prompt": "p", "chosen": "good", "rejected": "bad"}
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "p"), ("assistant", "good"), ("assistant", "bad"))
)
RANKED = {"prompt": "p", "completions": ["a", "b"], "rankings": [{"labeller": "x", "ranks": [1, 2]}]}


def chat_options():
    tokenizer = build_tokenizer(["hi"], 300)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return Options(tokenizer)


def argilla_answers(version):
    fields = {"prompt": "p", "response-1": "a", "response-2": "b", "context-note": "n"}
    users, order = (
        ["u1", "u2", "u3"],
        [["response-2", "response-1"], ["response-1", "response-2"], ["response-1", "response-2"]],
    )
    states = ["submitted", "submitted", "discarded"]
    entries = [[{"rank": rank, "value": name} for rank, name in enumerate(names, start=1)] for names in order]
    if version == "2":
        answers = [{"user_id": u, "value": o, "status": s} for u, o, s in zip(users, order, states, strict=True)]
        return {"id": "1", "fields": fields, "responses": {"rank": answers}, "suggestions": {}, "status": "completed"}
    if version == "2 flat":
        flat = {"rank.responses": order, "rank.responses.users": users, "rank.responses.status": states}
        return {"id": "1", "status": "pending", "_server_id": None, **fields, **flat, "rank.suggestion": ["response-1"]}
    if version == "1":
        responses = [
            {"user_id": u, "status": s, "values": {"rank": {"value": e}}}
            for u, s, e in zip(users, states, entries, strict=True)
        ]
        return {"fields": fields, "responses": responses}
    columns = [{"rank": [1, 2], "value": names} for names in order]
    return {
        **fields,
        "rank": [{"user_id": u, "value": c, "status": s} for u, c, s in zip(users, columns, states, strict=True)],
    }


def studio(result, data=None, **annotation):
    data = data or {"prompt": "p", "answer1": "a", "answer2": "b", "id": 3}
    annotations = [{"completed_by": {"id": 4, "email": "x@y"}, "was_cancelled": False, "result": result, **annotation}]
    return {"id": 9, "data": data, "annotations": annotations, "predictions": []}
