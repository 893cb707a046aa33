// Markdown as nodes. Every piece of an answer reaches the page through textContent, so it stays text in any case.

const INLINE = /`([^`\n]+)`|\*\*([^\n]+?)\*\*|__([^\n]+?)__|\*([^\s*][^*\n]*?)\*|\[([^\]\n]+)\]\(([^)\s]+)\)/g;
const ITEM = /^(\s*)(?:[-*+]|(\d+)[.)])\s+(.*)$/;
const STARTS_BLOCK = /^(\s*(?:[-*+]|\d+[.)])\s|#{1,6}\s|>|```|\s*\|)/;

const element = (name, text) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return made;
};

// Return the nodes of one line or paragraph.
function inline(text) {
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(at, match.index));
    at = match.index + match[0].length;
    const [, code, bold, strong, italic, label, address] = match;
    if (code !== undefined) nodes.push(element("code", code));
    else if (label !== undefined) nodes.push(`${label} (${address})`); // a link of a model is not to be clicked
    else {
      const part = element(italic === undefined ? "strong" : "em");
      part.append(...inline(bold ?? strong ?? italic));
      nodes.push(part);
    }
  }
  nodes.push(text.slice(at));
  return nodes;
}

function list(lines) {
  const made = element(ITEM.exec(lines[0])[2] ? "ol" : "ul");
  if (made.tagName === "OL") made.start = Number(ITEM.exec(lines[0])[2]);
  const depth = ITEM.exec(lines[0])[1].length;
  let below = [];
  const close = () => {
    if (below.length && ITEM.test(below[0])) made.lastChild.append(list(below));
    else if (below.length) made.lastChild.append(" ", ...inline(below.map((line) => line.trim()).join(" ")));
    below = [];
  };
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match && match[1].length <= depth) {
      close();
      const item = element("li");
      item.append(...inline(match[3]));
      made.append(item);
    } else below.push(line);
  }
  close();
  return made;
}

function table(lines) {
  const made = element("table");
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  lines.forEach((line, number) => {
    if (number === 1) return;
    const row = element("tr");
    for (const cell of cells(line)) {
      const made = element(number ? "td" : "th");
      made.append(...inline(cell));
      row.append(made);
    }
    made.append(row);
  });
  return made;
}

// Return the nodes of a whole text.
export function markdown(text) {
  const lines = text.split("\n"), nodes = [];
  for (let at = 0; at < lines.length;) {
    const line = lines[at];
    const take = (belongs) => {
      const first = at++;
      while (at < lines.length && belongs(lines[at])) at += 1;
      return lines.slice(first, at);
    };
    const heading = /^(#{1,6})\s+(.*)$/.exec(line);
    if (!line.trim()) at += 1;
    else if (line.startsWith("```")) {
      const code = take((next) => !next.startsWith("```"));
      at += 1; // the closing fence, which an answer that was cut off has not
      const block = element("pre");
      block.append(element("code", code.slice(1).join("\n")));
      nodes.push(block);
    } else if (heading) {
      const made = element("h3");
      made.append(...inline(heading[2]));
      nodes.push(made);
      at += 1;
    } else if (ITEM.test(line)) nodes.push(list(take((next) => ITEM.test(next) || /^\s+\S/.test(next))));
    else if (line.startsWith(">")) {
      const quote = element("blockquote");
      quote.append(...markdown(take((next) => next.startsWith(">")).map((one) => one.replace(/^> ?/, "")).join("\n")));
      nodes.push(quote);
    } else if (/^\s*\|/.test(line) && /^\s*\|[\s:|-]+$/.test(lines[at + 1] ?? "")) {
      nodes.push(table(take((next) => /^\s*\|/.test(next))));
    } else {
      const paragraph = element("p");
      paragraph.append(...inline(take((next) => next.trim() && !STARTS_BLOCK.test(next)).join("\n")));
      nodes.push(paragraph);
    }
  }
  return nodes;
}
