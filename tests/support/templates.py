"""Chat templates of our own, each with the mechanism of a published one."""

# Answers behind the last question get a thought; those of earlier turns lose theirs.
QWEN3 = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' and not (
    m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}
{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\nTools:' }}
{%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n' if content or not loop.first else '' }}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
# The end-of-text token once, behind everything, and only without a generation prompt.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# The system prompt is part of the last question.
MISTRAL = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
    "{%- set messages = messages[1:] %}{%- endif %}{{- bos_token }}"
    "{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- if (messages | length) % 2 == (loop.index % 2) and loop.index0 >= messages | length - 2 "
    "and system is defined %}{{- '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)
# The system prompt is part of the first question; no generation prompt; contents stripped.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system = false %}{% endif %}{% for m in loop_messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Thoughts are dropped everywhere, and the prompt opens one.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|User|>' + m['content'] }}{% elif m['role'] == 'assistant' %}"
    "{% if m['content'] is defined and m['content'] %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content.lstrip('\n') + eos_token }}{% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# Channels; the last answer ends with another token than those before it.
GPT_OSS = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{{- '<|im_start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{- eos_token if loop.last else '<|im_end|>' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '<|message|>' + m.content + '<|im_end|>' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"
)
# A date, tools in the first question, one call an answer under another key.
LLAMA3_1 = (
    "{{- bos_token }}{%- if not date_string is defined %}"
    "{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|im_start|>system\n\nToday Date: ' + date_string + '\n\n' + system + '<|im_end|>' }}"
    "{%- if tools is not none %}{%- set first = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{{- '<|im_start|>user\n\nAnswer with a call of:\n\n' }}"
    "{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}"
    "{{- first + '<|im_end|>' }}{%- endif %}"
    "{%- for m in messages %}{%- if 'tool_calls' in m %}"
    "{%- if m.tool_calls | length != 1 %}{{- raise_exception('only single tool-calls') }}"
    "{%- endif %}{%- set call = m.tool_calls[0].function %}"
    "{{- '<|im_start|>assistant\n\n' + '{\"name\": \"' + call.name + '\", \"parameters\": ' }}"
    "{{- call.arguments | tojson + '}<|im_end|>' }}"
    "{%- elif m.role == 'tool' %}"
    "{{- '<|im_start|>ipython\n\n' + (m.content | tojson) + '<|im_end|>' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{%- endif %}"
)
# Mistral's later kind: tools before the last question, calls as one list, ids of nine characters.
TEKKEN = (
    "{{- bos_token }}{%- set ns = namespace(last=-1) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- if tools is not none and loop.index0 == ns.last %}"
    "{{- '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{%- endif %}"
    "{{- '[INST]' + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls is defined and m.tool_calls is not none %}{{- '[CALLS][' }}"
    "{%- for call in m.tool_calls %}{%- if call.id | length != 9 %}"
    "{{- raise_exception('ids have nine characters') }}{%- endif %}"
    "{{- call.function | tojson + (', ' if not loop.last else ']' + eos_token) }}{%- endfor %}"
    "{%- elif m.role == 'tool' %}{{- '[RESULT]' + m.content | string + '[/RESULT]' }}"
    "{%- else %}{{- m.content + eos_token }}{%- endif %}{%- endfor %}"
)
# DeepSeek's calls: arguments are appended as text, and content must be None.
TEXT_CALLS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}"
    "{% for call in m['tool_calls'] %}{{ '<|call|>' + call['function']['name'] + ' ' + "
    "call['function']['arguments'] }}{% endfor %}{{ eos_token }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|Assistant|>' + m['content'] + eos_token }}"
    "{% else %}{{ '<|User|>' + m['content'] }}{% endif %}{% endfor %}"
    "{{ tools | tojson if tools else '' }}"
)
# No system prompt; the assistant has another name.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{{ '<start>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)
# The prompt has an empty thought unless thoughts are wanted; so have answers; a generation tag.
SMOLLM3 = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{% generation %}"
    "{{- '<|im_start|>assistant\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{% endgeneration %}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n' }}"
    "{%- endif %}"
)
# The prompt has an empty thought, and so have no answers but the last.
NO_THOUGHT = """
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and '</think>' in m.content %}
{{- '<think>\n' + m.content.split('</think>')[0].split('<think>')[-1] + '\n</think>\n\n' }}
{{- m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}
{%- else %}{{- m.content | trim + '<|im_end|>\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{%- endif %}
"""
