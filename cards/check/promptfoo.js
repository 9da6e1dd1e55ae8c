// What promptfooconfig.yaml names: the rows as promptfoo's tests, and how an answer is compared.
const fs = require('fs');
const path = require('path');

// promptfoo takes braces for its templates: in JSON an escape is the same text.
const plain = (value) =>
  JSON.stringify(value)
    .replace(/\{(?=[{%#])/g, '\\u007b')
    .replace(/(?<=[%#])\}/g, '\\u007d');

const settings = JSON.parse(fs.readFileSync(path.join(__dirname, 'student.json'), 'utf8'));

// A pattern of Python as JavaScript writes it; null where it can't.
const pattern = (text) => {
  const [, flags, rest] = /^(?:\(\?([ims]+)\))?([^]*)$/.exec(text);
  const translated = rest
    .replace(/\(\?P</g, '(?<')
    .replace(/\(\?P=(\w+)\)/g, '\\k<$1>')
    .replace(/\\A/g, '(?<![^])')
    .replace(/\\Z/g, '(?![^])');
  try {
    return new RegExp(translated, `${flags || ''}u`);
  } catch {
    return null;
  }
};

const tests = () =>
  fs
    .readFileSync(path.join(__dirname, 'rows.jsonl'), 'utf8')
    .split('\n')
    .filter(Boolean)
    .map((line) => JSON.parse(line))
    .filter((row) => !settings.tools[row.handle || ''] || !row.handle)
    .map((row) => {
      const remarks = row.wrong_at_release ? ['wrong when it was released'] : [];
      const { right, checks } = row;
      for (const [name, [kind, wanted]] of Object.entries(checks)) {
        if (kind.endsWith('matches') && !pattern(wanted)) {
          delete checks[name];
          remarks.push(`${name} is left out: not a pattern of JavaScript`);
        }
      }
      if ('pattern' in right && !pattern(right.pattern)) {
        delete right.pattern;
        remarks.push('its answer is not looked for: not a pattern of JavaScript');
      }
      return {
        description: [row.id, ...remarks].join('; '),
        vars: { messages: plain(row.messages), expected: plain({ right, checks }) },
      };
    });

const sorted = (value) => {
  if (Array.isArray(value)) return value.map(sorted);
  if (value === null || typeof value !== 'object') return value;
  return Object.fromEntries(Object.keys(value).sort().map((key) => [key, sorted(value[key])]));
};
const same = (one, other) => JSON.stringify(sorted(one)) === JSON.stringify(sorted(other));

const read = (output) => {
  if (typeof output !== 'string') {
    const said = Array.isArray(output) ? { tool_calls: output } : output;
    return { text: said.content || '', calls: (said.tool_calls || []).map((one) => one.function) };
  }
  const calls = [...output.matchAll(/<tool_call>([^]*?)<\/tool_call>/g)].map((one) => JSON.parse(one[1]));
  return { text: output.replace(/<tool_call>[^]*?<\/tool_call>/g, '').trim(), calls };
};

const bare = (text) => text.replace(/^```\w*\n|\n```$/g, '');

const named = (calls) =>
  calls
    .map(({ name, arguments: given }) => ({
      name,
      arguments: typeof given === 'string' ? JSON.parse(given || '{}') : given || {},
    }))
    .map((call) => JSON.stringify(sorted(call)))
    .sort();

const passes = (kind, wanted, { text, calls }) => {
  const lower = text.toLowerCase();
  const called = calls.map((call) => call.name);
  const holds = (one) => lower.includes(one.toLowerCase());
  switch (kind) {
    case 'matches': return pattern(wanted).test(text);
    case 'not_matches': return !pattern(wanted).test(text);
    case 'characters': {
      const length = [...text].length;
      return length >= wanted.min && (wanted.max === null || length <= wanted.max);
    }
    case 'starts_with': return wanted.some((one) => text.startsWith(one));
    case 'ends_with': return wanted.some((one) => text.endsWith(one));
    case 'calls': return wanted.every((one) => called.includes(one));
    case 'never_calls': return wanted === true ? !called.length : !wanted.some((one) => called.includes(one));
    case 'contains': return wanted.every(holds);
    case 'contains_any': return wanted.some(holds);
    case 'never': return !wanted.some(holds);
    default: throw new Error(`unknown check ${kind}`);
  }
};

const problem = (right, checks, answer) => {
  if (!answer.text && !answer.calls.length) return 'the answer is empty';
  if ('text' in right && answer.text !== right.text) return `expected ${right.text}`;
  if ('json' in right && !same(JSON.parse(bare(answer.text)), right.json)) return `expected ${JSON.stringify(right.json)}`;
  if ('field' in right) {
    const value = right.field.split('.').reduce((part, name) => part[name], JSON.parse(bare(answer.text)));
    if ((typeof value === 'string' ? value : JSON.stringify(value)) !== right.answer) return `expected ${right.answer}`;
  }
  if ('pattern' in right) {
    const found = pattern(right.pattern).exec(answer.text);
    if (!found || found.groups.answer.trim() !== right.answer) return `expected ${right.answer}`;
  }
  if ('calls' in right && !same(named(answer.calls), named(right.calls))) return `expected ${JSON.stringify(right.calls)}`;
  const failed = Object.entries(checks).find(([, [kind, wanted]]) => !passes(kind, wanted, answer));
  return failed ? `check ${failed[0]} fails` : null;
};

const compare = (output, context) => {
  let reason;
  try {
    const { right, checks } = JSON.parse(context.vars.expected);
    reason = problem(right, checks, read(output));
  } catch (error) {
    reason = String(error);
  }
  return { pass: !reason, score: reason ? 0 : 1, reason: reason || 'as expected' };
};

module.exports = { tests, compare };
