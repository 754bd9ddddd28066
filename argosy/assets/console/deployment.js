
// The live view: polls /deployment and draws what it says. Rates are differences between two answers.

const POLL_MS = 1000;
const IDLE_POLL_MS = 5000; // while only the status line is to be seen
const POLL_LIMIT_MS = 8000;
const NUM_RATES = 120;
const SPAN_S = 60;

let latest = null; // the last answer
let timer = null;
let polling = null; // the AbortController of the question under way
const rates = []; // generated tokens a second, oldest first
const replicaRates = new Map(); // dp -> {timeS, tokens, rate}
const pastLoads = []; // {timeS, tokens: layers x experts} within the last minute, oldest first
let lastGenerated = null; // {timeS, tokens}
let heatMap = null;

const isLive = () => !find("deployment-view").hidden && !document.hidden;

function schedulePoll(delayMs) {
  clearTimeout(timer);
  timer = setTimeout(poll, delayMs);
}

/** Ask now, instead of the question under way. */
async function poll() {
  clearTimeout(timer);
  polling?.abort();
  const mine = (polling = new AbortController());
  const limit = setTimeout(() => mine.abort(), POLL_LIMIT_MS);
  try {
    const answer = await ask(`/deployment?experts=${isLive()}`, { signal: mine.signal });
    takeDeployment(await answer.json());
  } catch (error) {
    if (polling !== mine) return;
    showTrouble(error);
  } finally {
    clearTimeout(limit);
  }
  if (polling === mine) schedulePoll(isLive() ? POLL_MS : IDLE_POLL_MS);
}

function takeDeployment(deployment) {
  latest = deployment;
  noteRates(deployment);
  noteLoads(deployment);
  showServer(deployment);
  if (isLive()) showDeployment();
}

function showTrouble(error) {
  latest = null;
  const isServers = error instanceof ServerError;
  showStatus("failed", error.status === 401 ? "key" : "unreachable");
  const notice = find("deployment-notice");
  if (isServers) {
    delete notice.dataset.word;
    notice.textContent = error.message;
  } else {
    say(notice, "unreachable");
  }
  notice.hidden = false;
  find("deployment-body").hidden = true;
}

function showServer({ server, engines }) {
  find("model").textContent = server.model;
  document.title = `${server.model} · Argosy`;
  if (server.status !== "ready") showStatus("starting", "", server.status);
  else if (engines.some((engine) => engine.state === "restarting")) showStatus("restarting", "restarting");
  else if (engines.some((engine) => engine.state === "failed")) showStatus("failed", "failed");
  else showStatus("ready", "ready");
}

// --- what only several answers tell ----------------------------------------------------------------------------------

function noteRates({ server, engines, replicas }) {
  const now = { timeS: server.time_s, tokens: server.generation_tokens };
  if (lastGenerated && now.tokens >= lastGenerated.tokens && now.timeS > lastGenerated.timeS) {
    const rate = (now.tokens - lastGenerated.tokens) / (now.timeS - lastGenerated.timeS);
    rates.push(rate);
    if (rates.length > NUM_RATES) rates.shift();
  }
  lastGenerated = now;
  for (const replica of replicas) {
    const timeS = engines[replica.engine].time_s;
    const before = replicaRates.get(replica.dp);
    if (before?.timeS === timeS) continue; // nothing new was told
    const tokens = replica.num_scheduled_tokens;
    const isLater = before && tokens >= before.tokens;
    replicaRates.set(replica.dp, { timeS, tokens, rate: isLater ? (tokens - before.tokens) / (timeS - before.timeS) : 0 });
  }
}

function noteLoads({ server, experts }) {
  if (!experts) return;
  const last = pastLoads.at(-1)?.tokens;
  if (last && experts.tokens.some((counts, layer) => counts.some((count, expert) => count < last[layer][expert])))
    pastLoads.length = 0; // an engine has started again
  pastLoads.push({ timeS: server.time_s, tokens: experts.tokens });
  while (pastLoads[0].timeS < server.time_s - SPAN_S) pastLoads.shift();
}

function chosenLoads(experts) {
  if (find("span-start").checked) return experts.tokens;
  const first = pastLoads[0].tokens;
  return experts.tokens.map((counts, layer) => counts.map((count, expert) => count - first[layer][expert]));
}

// --- the page --------------------------------------------------------------------------------------------------------

function showDeployment() {
  if (!latest) return;
  const isStarting = !latest.description;
  find("deployment-body").hidden = isStarting;
  find("deployment-notice").hidden = !isStarting;
  if (isStarting) {
    delete find("deployment-notice").dataset.word;
    find("deployment-notice").textContent = latest.server.status;
    return;
  }
  showSummary(latest);
  showFigures(latest);
  showNodes(latest.ranks);
  showReplicas(latest.replicas);
  showEngines(latest.engines);
  showSteps(latest.replicas);
  showExperts(latest.experts);
}

function showSummary({ server, description, ranks }) {
  say(find("deployment-summary"), "summary", {
    model: server.model,
    ranks: ranks.length,
    device: description.device_name,
    format: description.number_format,
    length: () => formatNumber(description.max_model_len),
    version: server.version,
  });
}

const sumOf = (views, name) => views.reduce((sum, view) => sum + view[name], 0);

function showFigures({ replicas }) {
  const rate = rates.at(-1) ?? 0;
  find("figure-rate").textContent = formatNumber(rate, rate && rate < 10 ? 1 : 0);
  find("figure-running").textContent = formatNumber(sumOf(replicas, "num_running"));
  find("figure-waiting").textContent = formatNumber(sumOf(replicas, "num_waiting"));
  find("figure-cache").textContent = formatShare(sumOf(replicas, "blocks_used"), sumOf(replicas, "blocks_total"));
  find("figure-prefix").textContent = formatShare(sumOf(replicas, "num_cached_tokens"), sumOf(replicas, "num_queried_tokens"));
  const steps = replicas.flatMap((replica) => replica.recent_steps.map(([, seconds]) => seconds));
  find("figure-step").textContent = steps.length ? formatMilliseconds(median(steps)) : "–";
  drawRates(find("rate-chart"), rates, NUM_RATES);
}

function showNodes(ranks) {
  const nodes = groupByNode(ranks);
  const sections = [...nodes].map(([node, members]) => {
    const section = make("section", "node");
    const list = make("ul", "ranks");
    list.append(...members.map(buildRank));
    section.append(makeSaying("h3", "", "node", { number: node }), list);
    return section;
  });
  find("nodes").replaceChildren(...sections);
}

function groupByNode(ranks) {
  const nodes = new Map();
  for (const rank of ranks) nodes.set(rank.node, [...(nodes.get(rank.node) ?? []), rank]);
  return nodes;
}

function buildRank(rank) {
  const item = make("li", "rank");
  item.dataset.state = rank.state;
  const head = make("p", "rank-head");
  const state = make("span", "state");
  state.dataset.state = rank.state;
  const dot = make("span", "dot");
  dot.setAttribute("aria-hidden", "true");
  state.append(dot, makeSaying("span", "", rank.state));
  const number = make("span", "rank-number", String(rank.rank));
  if (rank.is_leader) number.append(makeSaying("small", "", "leader"));
  head.append(number, state);
  const place = make("dl", "coords");
  for (const axis of ["dp", "tp", "ep"]) {
    const pair = make("div");
    pair.append(make("dt", "", axis), make("dd", "", String(rank[axis])));
    place.append(pair);
  }
  const foot = make("p", "rank-foot");
  foot.append(rank.pid ? makeSaying("span", "", "process", { pid: rank.pid }) : makeSaying("span", "", "noProcess"));
  const numBytes = Object.values(rank.bytes_sent).reduce((sum, count) => sum + count, 0);
  if (numBytes) foot.append(makeSaying("span", "", "sent", { bytes: () => formatBytes(numBytes) }));
  item.append(head, place, foot);
  return item;
}

function showReplicas(replicas) {
  const heads = ["replica", "running", "waiting", "throughput", "cache", "prefixHits", "preempted", "dummySteps"];
  find("replicas-head").replaceChildren(
    ...heads.map((name) => {
      const head = makeSaying("th", "", name);
      head.scope = "col";
      return head;
    }),
  );
  find("replicas-body").replaceChildren(...replicas.map(buildReplica));
}

function buildReplica(replica) {
  const row = make("tr");
  const name = make("th", "", String(replica.dp));
  name.scope = "row";
  const cells = [
    formatNumber(replica.num_running),
    formatNumber(replica.num_waiting),
    formatNumber(replicaRates.get(replica.dp)?.rate ?? 0),
    null,
    formatShare(replica.num_cached_tokens, replica.num_queried_tokens),
    formatNumber(replica.num_preemptions),
    formatNumber(replica.num_dummy_steps),
  ].map((text) => make("td", "", text ?? ""));
  cells[3].append(buildCacheBar(replica));
  row.append(name, ...cells);
  return row;
}

/** Used, and cached by a prefix alone. */
function buildCacheBar(replica) {
  const bar = make("span", "cache-bar");
  for (const [kind, count] of [["used", replica.blocks_used], ["cached", replica.blocks_cached]]) {
    const part = make("span", kind);
    part.style.width = `${(100 * count) / Math.max(1, replica.blocks_total)}%`;
    bar.append(part);
  }
  const cell = make("span", "cache");
  cell.append(bar, make("span", "", formatShare(replica.blocks_used, replica.blocks_total)));
  return cell;
}

function showEngines(engines) {
  const items = engines.map((engine) => {
    const item = make("li");
    const values = { state: () => word(engine.state), time: () => formatDuration(engine.in_state_s), restarts: engine.num_restarts };
    const state = make("span", "state");
    state.dataset.state = engine.state;
    state.append(make("span", "dot"), makeSaying("strong", "", "engineLine", { index: engine.index }));
    item.append(state, makeSaying("span", "", "engineState", values));
    if (engine.state !== "ready") item.append(make("span", "last-message", engine.last_message));
    return item;
  });
  find("engines").replaceChildren(...items);
}

function showSteps(replicas) {
  const place = find("steps");
  while (place.children.length > replicas.length) place.lastChild.remove();
  while (place.children.length < replicas.length) {
    const figure = make("figure", "steps");
    const caption = make("figcaption");
    caption.append(make("strong"), make("span"));
    figure.append(caption, make("canvas"));
    place.append(figure);
  }
  const longestS = Math.max(1e-6, ...replicas.flatMap((replica) => replica.recent_steps.map(([, seconds]) => seconds)));
  replicas.forEach((replica, i) => {
    const figure = place.children[i];
    const [name, text] = figure.querySelectorAll("strong, span");
    const steps = replica.recent_steps;
    const seconds = steps.map(([, duration]) => duration);
    say(name, "stepsOf", { dp: replica.dp });
    if (steps.length) {
      const values = { count: steps.length, dummies: steps.filter(([, , tokens]) => !tokens).length };
      say(text, "stepsText", { ...values, median: () => formatMilliseconds(median(seconds)), longest: () => formatMilliseconds(Math.max(...seconds)) });
    } else {
      say(text, "noSteps");
    }
    drawSteps(figure.querySelector("canvas"), steps, longestS);
  });
}

// --- experts ---------------------------------------------------------------------------------------------------------

function showExperts(experts) {
  const tokens = experts && chosenLoads(experts);
  const isEmpty = !tokens?.length || !tokens.some((counts) => counts.some(Boolean));
  find("experts").hidden = isEmpty;
  find("experts-notice").hidden = !isEmpty;
  if (isEmpty) return;
  const canvas = find("heat-map");
  const imbalances = tokens.map(imbalanceOf);
  heatMap ??= new HeatMap(canvas, showReading);
  heatMap.show(tokens, experts.num_ep_ranks);
  const worst = imbalances.indexOf(Math.max(...imbalances));
  const values = { layers: tokens.length, experts: tokens[0].length, worst, imbalance: formatNumber(imbalances[worst], 2) };
  canvas.setAttribute("aria-label", word("heatLabel", values));
  labelLayers(imbalances, worst);
  find("heat-top").textContent = `${formatNumber(heatMap.scale.top, 1)}×`;
  heatMap.drawLegend(find("heat-legend"));
}

function labelLayers(imbalances, worst) {
  const isDense = imbalances.length > 24; // then every fourth line has a number
  const style = (element) => {
    element.style.height = `${heatMap.rowHeight}px`;
    return element;
  };
  find("heat-layers").replaceChildren(
    ...imbalances.map((_, layer) => style(make("span", "", isDense && layer % 4 ? "" : String(layer)))),
  );
  find("heat-imbalance").replaceChildren(
    ...imbalances.map((value, layer) => {
      const isShown = !isDense || layer % 4 === 0 || layer === worst;
      return style(make("span", layer === worst ? "worst" : "", isShown ? `${formatNumber(value, 2)}×` : ""));
    }),
  );
}

function showReading(cell) {
  const place = find("heat-readout");
  if (!cell) {
    delete place.dataset.word;
    place.textContent = "";
    return;
  }
  say(place, "readout", { ...cell, tokens: () => formatNumber(cell.tokens), ratio: () => formatNumber(cell.ratio, 2) });
}

function startDeployment() {
  drawers.add(() => isLive() && showDeployment());
  for (const id of ["span-start", "span-minute"]) find(id).addEventListener("change", showDeployment);
  window.addEventListener("resize", () => isLive() && showDeployment());
  document.addEventListener("visibilitychange", () => !document.hidden && poll());
}
