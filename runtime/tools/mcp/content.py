"""The text that a model reads of a call's result."""

import json

from mcp import types


def text_of(result: types.CallToolResult) -> str:
    """Return a result as text: text as it is, structured content if there is no text, and a line per other content."""
    parts = [_block_text(block) for block in result.content]
    has_text = any(isinstance(block, types.TextContent) for block in result.content)
    if not has_text and result.structured_content is not None:
        parts.insert(0, json.dumps(result.structured_content, ensure_ascii=False))
    return "\n".join(parts)


def _block_text(block: types.ContentBlock) -> str:
    match block:
        case types.TextContent():
            return block.text
        case types.ImageContent() | types.AudioContent():
            return f"[{block.type}: {block.mime_type}, {len(block.data) * 3 // 4} bytes, not shown]"
        case types.ResourceLink():
            return f"[resource: {block.uri}, {block.mime_type or 'unknown type'}, not shown]"
        case types.EmbeddedResource(resource=resource):
            return f"[resource: {resource.uri}, {resource.mime_type or 'unknown type'}, not shown]"
