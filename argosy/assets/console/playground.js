
// The playground: a conversation over /v1/chat/completions. Whatever a model writes becomes text nodes, never markup.

const NUMBER_FIELDS = ["temperature", "max_tokens", "top_p", "top_k", "seed"];
const INTEGER_FIELDS = new Set(["max_tokens", "top_k", "seed"]);
const FIELD_WORDS = { temperature: "temperature", max_tokens: "maxTokens", top_p: "topP", top_k: "topK", seed: "seed" };
const FIELDS_AT_FAULT = [...NUMBER_FIELDS, "tools"]; // that an error may name
const NEAR_END_PX = 120; // so close to the end of the page, the reader follows the answer

class FieldError extends Error {
  constructor(field, message) {
    super(message);
    this.param = field;
  }
}

let turns = []; // {role, content, tool_calls}: what the model is told of the conversation
let running = null; // the AbortController of the answer under way

function readSampling() {
  const sampling = {};
  for (const field of NUMBER_FIELDS) {
    const value = find(field).value.trim();
    if (!value) continue;
    const number = Number(value);
    const name = word(FIELD_WORDS[field]);
    if (!Number.isFinite(number)) throw new FieldError(field, word("notANumber", { name, value }));
    if (INTEGER_FIELDS.has(field) && Math.abs(number) > Number.MAX_SAFE_INTEGER)
      throw new FieldError(field, word("tooLong", { name, value }));
    sampling[field] = number;
  }
  const tools = find("tools").value.trim();
  if (tools) sampling.tools = readTools(tools);
  if (find("thinking").checked) sampling.chat_template_kwargs = { thinking: true };
  return sampling;
}

function readTools(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new FieldError("tools", word("notJson", { name: word("tools"), reason: error.message }));
  }
}

function markField(field) {
  for (const name of FIELDS_AT_FAULT) find(name).setAttribute("aria-invalid", String(name === field));
  if (FIELDS_AT_FAULT.includes(field)) find("settings").open = true;
}

function buildMessages() {
  const system = find("system").value.trim();
  return [...(system ? [{ role: "system", content: system }] : []), ...turns];
}

/** One answer as it grows on the page. */
class AnswerView {
  constructor(question) {
    this.startedMs = performance.now();
    this.firstMs = null;
    this.lastMs = null;
    this.numTokens = 0;
    this.content = "";
    this.calls = []; // as the conversation keeps them
    this.callTexts = []; // the text node of each call's arguments
    this.finishReason = null;
    this.turn = make("article", "turn");
    const asked = make("div", "asked");
    asked.append(makeSaying("h3", "who", "you"), make("p", "text", question));
    this.answer = make("div", "answer");
    this.answer.setAttribute("aria-busy", "true");
    this.body = make("div", "answer-body");
    this.wait = makeSaying("p", "pending", "waitingForTokens");
    this.meta = make("p", "meta");
    this.body.append(this.wait);
    this.answer.append(makeSaying("h3", "who", "model"), this.body, this.meta);
    this.turn.append(asked, this.answer);
    this.reasoningText = null;
    this.contentText = null;
  }

  take(delta, usage) {
    if (usage) this.numTokens = usage.completion_tokens;
    const reasoning = delta?.reasoning_content ?? "";
    const content = delta?.content ?? "";
    const calls = delta?.tool_calls ?? [];
    if (!reasoning && !content && !calls.length) return;
    this.lastMs = performance.now();
    this.firstMs ??= this.lastMs;
    this.wait.remove();
    if (reasoning) this.addReasoning(reasoning);
    if (content) this.addContent(content);
    for (const call of calls) this.addCall(call);
    this.showMeta();
  }

  addReasoning(text) {
    if (!this.reasoningText) {
      this.reasoning = make("details", "reasoning");
      this.reasoning.open = true;
      const paragraph = make("p", "text");
      this.reasoningText = paragraph.appendChild(document.createTextNode(""));
      const summary = makeSaying("summary", "", "reasoning");
      summary.addEventListener("click", () => (this.isReasoningChosen = true));
      this.reasoning.append(summary, paragraph);
      this.body.prepend(this.reasoning);
    }
    this.reasoningText.appendData(text);
  }

  addContent(text) {
    if (!this.contentText) {
      text = text.trimStart();
      if (!text) return;
      const paragraph = make("p", "text");
      this.contentText = paragraph.appendChild(document.createTextNode(""));
      this.body.append(paragraph);
      this.foldReasoning();
    }
    this.contentText.appendData(text);
    this.content += text;
  }

  /** A call's first piece has its name; arguments may come in several. */
  addCall({ index, id, function: { name, arguments: text = "" } }) {
    if (!this.calls[index]) {
      this.calls[index] = { id, type: "function", function: { name, arguments: "" } };
      const box = make("div", "call");
      const title = makeSaying("p", "call-title", "toolCall");
      title.append(" ", make("code", "call-name", name));
      const json = make("pre", "call-arguments");
      this.callTexts[index] = json.appendChild(document.createTextNode(""));
      box.append(title, json);
      this.body.append(box);
      this.foldReasoning();
    }
    this.callTexts[index].appendData(text);
    this.calls[index].function.arguments += text;
  }

  foldReasoning() {
    if (this.reasoning && !this.isReasoningChosen) this.reasoning.open = false;
  }

  /** What the conversation keeps; null where nothing was answered. */
  get message() {
    if (!this.content && !this.calls.length) return null;
    return { role: "assistant", content: this.content, ...(this.calls.length ? { tool_calls: this.calls } : {}) };
  }

  get spoken() {
    const calls = this.calls.map(({ function: { name, arguments: text } }) => `${word("toolCall")} ${name} ${text}`);
    return [this.content, ...calls].filter(Boolean).join(" ");
  }

  showMeta(endWord = "") {
    this.meta.replaceChildren();
    if (this.firstMs !== null) {
      const seconds = (this.lastMs - this.firstMs) / 1000;
      const ttftS = (this.firstMs - this.startedMs) / 1000;
      this.addMeta("ttft", "metaFirst", { ttft: () => formatMilliseconds(ttftS) });
      const rate = (this.numTokens - 1) / seconds;
      if (this.numTokens > 1 && seconds > 0) this.addMeta("rate", "metaRate", { rate: () => formatNumber(rate, rate < 10 ? 1 : 0) });
      if (this.numTokens) this.addMeta("tokens", "metaTokens", { count: () => formatNumber(this.numTokens) });
    }
    if (endWord) this.addMeta("end", endWord);
  }

  addMeta(kind, name, values = {}) {
    const part = makeSaying("span", "", name, values);
    part.dataset.meta = kind;
    this.meta.append(part);
  }

  end(endWord = "") {
    this.wait.remove();
    this.answer.setAttribute("aria-busy", "false");
    this.showMeta(endWord);
    if (this.content) this.meta.append(this.buildCopyButton());
  }

  buildCopyButton() {
    const button = makeSaying("button", "link", "copy");
    button.type = "button";
    button.addEventListener("click", async () => {
      await navigator.clipboard?.writeText(this.content);
      say(button, "copied");
    });
    return button;
  }

  fail(error, retry) {
    const box = make("div", "error");
    box.setAttribute("role", "alert");
    box.append(make("p", "text", error.message));
    if (error.requestId) box.append(makeSaying("p", "request-id", "requestId", { id: error.requestId }));
    const button = makeSaying("button", "", "tryAgain");
    button.type = "button";
    button.addEventListener("click", retry);
    box.append(button);
    this.body.append(box);
  }
}

async function send(text) {
  if (running || !text.trim()) return;
  markField(null);
  const view = new AnswerView(text);
  find("opening").hidden = true;
  find("turns").append(view.turn);
  const question = { role: "user", content: text };
  turns.push(question);
  setRunning(new AbortController());
  const { signal } = running;
  scrollToEnd(true);
  announce(word("generating"));
  try {
    await stream({ messages: buildMessages(), ...readSampling() }, view, signal);
    view.end(view.finishReason === "length" ? "endLength" : view.finishReason === "abort" ? "endAbort" : "");
    announce(word("answered", { text: view.spoken }));
  } catch (error) {
    endEarly(view, error, signal, question);
  }
  if (view.message && turns.includes(question)) turns.push(view.message);
  else turns = turns.filter((turn) => turn !== question); // a question without an answer is not told again
  if (signal === running?.signal) setRunning(null);
  scrollToEnd();
}

function endEarly(view, error, signal, question) {
  view.end(signal.aborted ? "endStopped" : "");
  if (signal.aborted) {
    announce(word("stopped"));
    return;
  }
  const isOurs = error instanceof ServerError || error instanceof FieldError;
  const shown = isOurs ? error : new Error(word("noAnswer", { reason: error.message }));
  markField(shown.param ?? null);
  view.fail(shown, () => {
    if (running) return;
    view.turn.remove();
    send(question.content);
  });
}

async function stream(request, view, signal) {
  const answer = await ask("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } }),
    signal,
  });
  const requestId = answer.headers.get("X-Request-Id");
  let isDone = false;
  for await (const event of readEvents(answer.body)) {
    if (event === "[DONE]") {
      isDone = true;
      continue;
    }
    const chunk = JSON.parse(event);
    if (chunk.error) throw new ServerError(200, chunk.error, requestId);
    const follows = isNearEnd();
    const choice = chunk.choices[0];
    view.take(choice?.delta, chunk.usage);
    view.finishReason = choice?.finish_reason ?? view.finishReason;
    if (follows) scrollToEnd(true);
  }
  if (!isDone) throw new ServerError(200, { message: word("broken") }, requestId);
}

/** The data of server-sent events. */
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) if (event.startsWith("data: ")) yield event.slice(6);
  }
}

function setRunning(controller) {
  const hadFocus = [find("send"), find("stop")].includes(document.activeElement);
  running = controller;
  find("send").hidden = Boolean(controller);
  find("stop").hidden = !controller;
  if (hadFocus) find(controller ? "stop" : "message").focus();
}

function stop() {
  running?.abort();
}

function startOver() {
  stop();
  setRunning(null);
  turns = [];
  find("turns").replaceChildren();
  find("opening").hidden = false;
  markField(null);
  find("message").focus();
}

function isNearEnd() {
  const page = document.documentElement;
  return page.scrollHeight - page.clientHeight - page.scrollTop < NEAR_END_PX;
}

function scrollToEnd(isForced = false) {
  if (isForced || isNearEnd()) document.documentElement.scrollTop = document.documentElement.scrollHeight;
}

function fitMessage() {
  const field = find("message");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, window.innerHeight * 0.4)}px`;
}

function sendMessage() {
  const field = find("message");
  if (running || !field.value.trim()) return;
  const text = field.value;
  field.value = "";
  fitMessage();
  send(text);
}

function showSamples() {
  const items = SAMPLES[language].map((text) => {
    const item = make("li");
    const button = make("button", "sample", text);
    button.type = "button";
    button.addEventListener("click", () => send(text));
    item.append(button);
    return item;
  });
  find("samples").replaceChildren(...items);
}

function startPlayground() {
  drawers.add(showSamples);
  find("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    sendMessage();
  });
  find("message").addEventListener("input", fitMessage);
  find("message").addEventListener("keydown", (event) => {
    // While an input method composes, Enter chooses a word.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    sendMessage();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing) stop();
  });
  find("stop").addEventListener("click", stop);
  find("new-conversation").addEventListener("click", startOver);
  if (window.matchMedia("(max-width: 60rem)").matches) find("settings").open = false;
}
