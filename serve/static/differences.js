// Word differences between two answers, as nodes.

const MOST_WORDS = 1500; // the work grows with the product of both lengths

const words = (text) => text.match(/\s+|[^\s]+/g) ?? [];

// Return how much of `text` differs from `other`: words that are new are marked, words that are missing struck out.
export function differences(text, other) {
  const now = words(text).slice(0, MOST_WORDS), before = words(other).slice(0, MOST_WORDS);
  const longest = Array.from({ length: now.length + 1 }, () => new Uint16Array(before.length + 1));
  for (let i = now.length - 1; i >= 0; i--) {
    for (let j = before.length - 1; j >= 0; j--) {
      longest[i][j] = now[i] === before[j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
    }
  }
  const parts = [];
  const add = (kind, word) => {
    if (parts.at(-1)?.kind === kind) parts.at(-1).text += word;
    else parts.push({ kind, text: word });
  };
  let i = 0, j = 0;
  while (i < now.length || j < before.length) {
    if (i < now.length && j < before.length && now[i] === before[j]) {
      add("same", now[i]);
      i += 1;
      j += 1;
    } else if (j < before.length && (i === now.length || longest[i][j + 1] >= longest[i + 1][j])) add("del", before[j++]);
    else add("ins", now[i++]);
  }
  add("same", words(text).slice(MOST_WORDS).join(""));
  return parts.map(({ kind, text }) => {
    if (kind === "same") return text;
    const node = document.createElement(kind);
    node.textContent = text;
    return node;
  });
}
