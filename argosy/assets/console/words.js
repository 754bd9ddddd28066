"use strict";

// Every word on the page, in both languages. {name} stands for a value.
const WORDS = {
  en: {
    skip: "Skip to content",
    views: "Views",
    playground: "Playground",
    deployment: "Deployment",
    key: "Key",
    apiKey: "API key",
    useKey: "Use",
    keyNote: "Kept in this tab only, until you close it.",
    keyWanted: "The server asks for an API key.",
    connecting: "Connecting",
    unreachable: "Server not reached",
    ready: "Ready",
    starting: "Starting",
    restarting: "Restarting",
    failed: "Failed",
    toDark: "Dark",
    toLight: "Light",
    themeLabel: "Switch to the {theme} theme",
    opening: "What shall we compute?",
    openingText: "Whatever you write here goes to the model of this server, and nowhere else.",
    conversation: "Conversation",
    message: "Message",
    messageHint: "Write a message",
    composerHint: "Enter sends, Shift + Enter begins a line, Escape stops",
    send: "Send",
    stop: "Stop",
    newConversation: "New conversation",
    settings: "Settings",
    system: "System prompt",
    systemHint: "None",
    tools: "Tools",
    toolsHint: "A JSON list, as in the API",
    thinking: "Think first",
    temperature: "Temperature",
    topP: "Top p",
    topK: "Top k",
    maxTokens: "Max tokens",
    seed: "Seed",
    unlimited: "no limit",
    all: "all",
    random: "random",
    you: "You",
    model: "Model",
    reasoning: "Reasoning",
    toolCall: "Tool call",
    waitingForTokens: "Waiting for the first token",
    metaFirst: "first token {ttft}",
    metaRate: "{rate} tokens/s",
    metaTokens: "{count} tokens",
    endLength: "ended at the limit",
    endStopped: "stopped by you",
    endAbort: "ended by the server",
    tryAgain: "Try again",
    requestId: "Request {id}",
    copy: "Copy",
    copied: "Copied",
    notANumber: "{name}: “{value}” is not a number",
    notJson: "{name}: this is not JSON ({reason})",
    tooLong: "{name}: {value} has more digits than a browser keeps; use a smaller number",
    noAnswer: "The server could not be reached: {reason}",
    broken: "The answer ended before it was complete",
    generating: "The model answers",
    answered: "Answer: {text}",
    stopped: "Stopped",
    generated: "Generated",
    tokensPerSecond: "tokens/s",
    running: "Running",
    waiting: "Waiting",
    cacheUse: "Cache in use",
    prefixHits: "Prefix hits",
    stepTime: "Median step",
    ranks: "Ranks",
    node: "Node {number}",
    leader: "leader",
    sent: "sent {bytes}",
    process: "process {pid}",
    noProcess: "no process",
    replicas: "Replicas",
    engines: "Engines",
    replica: "Replica",
    throughput: "Tokens/s",
    cache: "Cache",
    preempted: "Preempted",
    dummySteps: "Dummy steps",
    engineLine: "Engine {index}",
    engineState: "{state} for {time}, restarts: {restarts}",
    steps: "Recent steps",
    stepsOf: "Replica {dp}",
    stepsText: "median {median}, longest {longest}, {count} steps, {dummies} of them dummies",
    noSteps: "no step yet",
    experts: "Expert load",
    expertsText: "Tokens that each expert received, a line a layer. At the end of a line: the busiest expert over the mean.",
    noExperts: "No expert has had a token yet.",
    span: "Time span",
    sinceStart: "Since the start",
    lastMinute: "Last minute",
    layer: "layer {number}",
    readout: "Layer {layer}, expert {expert}: {tokens} tokens, {ratio}× the mean (ep rank {rank})",
    heatLabel: "Heat map of {layers} layers and {experts} experts. Most uneven: layer {worst}, {imbalance}×. Arrow keys read single experts.",
    summary: "{model} on {ranks} ranks: {device}, {format}; up to {length} tokens a request; version {version}",
    seconds: "{n} s",
    minutes: "{n} min",
    hours: "{n} h",
  },
  zh: {
    skip: "跳到正文",
    views: "视图",
    playground: "对话",
    deployment: "部署",
    key: "密钥",
    apiKey: "API 密钥",
    useKey: "使用",
    keyNote: "只保存在本标签页，关闭即清除。",
    keyWanted: "服务器需要 API 密钥。",
    connecting: "正在连接",
    unreachable: "无法连接服务器",
    ready: "就绪",
    starting: "正在启动",
    restarting: "正在重启",
    failed: "已失败",
    toDark: "深色",
    toLight: "浅色",
    themeLabel: "切换到{theme}主题",
    opening: "想算点什么？",
    openingText: "您写的内容只会发给这台服务器上的模型，不会去别处。",
    conversation: "对话内容",
    message: "消息",
    messageHint: "输入消息",
    composerHint: "Enter 发送，Shift + Enter 换行，Esc 停止",
    send: "发送",
    stop: "停止",
    newConversation: "新对话",
    settings: "设置",
    system: "系统提示词",
    systemHint: "无",
    tools: "工具",
    toolsHint: "JSON 列表，与 API 相同",
    thinking: "先思考再回答",
    temperature: "温度",
    topP: "Top p",
    topK: "Top k",
    maxTokens: "最多词元",
    seed: "随机种子",
    unlimited: "不限",
    all: "全部",
    random: "随机",
    you: "您",
    model: "模型",
    reasoning: "思考过程",
    toolCall: "工具调用",
    waitingForTokens: "等待第一个词元",
    metaFirst: "首词元 {ttft}",
    metaRate: "{rate} 词元/秒",
    metaTokens: "{count} 个词元",
    endLength: "到达长度上限",
    endStopped: "已由您停止",
    endAbort: "已由服务器结束",
    tryAgain: "重试",
    requestId: "请求 {id}",
    copy: "复制",
    copied: "已复制",
    notANumber: "{name}：“{value}”不是数字",
    notJson: "{name}：不是 JSON（{reason}）",
    tooLong: "{name}：{value} 超出浏览器能精确表示的范围，请用较小的数",
    noAnswer: "无法连接服务器：{reason}",
    broken: "回答未完成就中断了",
    generating: "模型正在回答",
    answered: "回答：{text}",
    stopped: "已停止",
    generated: "生成速度",
    tokensPerSecond: "词元/秒",
    running: "运行中",
    waiting: "排队中",
    cacheUse: "缓存占用",
    prefixHits: "前缀命中",
    stepTime: "单步用时中位数",
    ranks: "Rank 布局",
    node: "节点 {number}",
    leader: "主导",
    sent: "已发送 {bytes}",
    process: "进程 {pid}",
    noProcess: "无进程",
    replicas: "副本",
    engines: "引擎",
    replica: "副本",
    throughput: "词元/秒",
    cache: "缓存",
    preempted: "被抢占",
    dummySteps: "空步",
    engineLine: "引擎 {index}",
    engineState: "{state}，已持续 {time}，重启 {restarts} 次",
    steps: "最近的步",
    stepsOf: "副本 {dp}",
    stepsText: "中位数 {median}，最长 {longest}，共 {count} 步，其中空步 {dummies}",
    noSteps: "还没有步",
    experts: "专家负载",
    expertsText: "每个专家收到的词元数，一行一层。行末数字：最忙的专家与平均值之比。",
    noExperts: "还没有专家收到词元。",
    span: "时间范围",
    sinceStart: "自启动以来",
    lastMinute: "最近一分钟",
    layer: "第 {number} 层",
    readout: "第 {layer} 层，专家 {expert}：{tokens} 个词元，为平均值的 {ratio} 倍（ep rank {rank}）",
    heatLabel: "热力图：{layers} 层、{experts} 个专家。最不均衡的是第 {worst} 层，{imbalance} 倍。方向键可逐个查看专家。",
    summary: "{model}，{ranks} 个 rank：{device}，{format}；每个请求最多 {length} 个词元；版本 {version}",
    seconds: "{n} 秒",
    minutes: "{n} 分钟",
    hours: "{n} 小时",
  },
};

const SAMPLES = {
  en: ["17 + 25 = ?", "Which is larger, 9 or 12?", "What is the capital of France?"],
  zh: ["17 + 25 = ?", "法国的首都是哪里？", "9 和 12 哪个大？"],
};

let language = "en";
const wordValues = new WeakMap(); // element -> the values of its words

function word(name, values = {}) {
  const text = WORDS[language][name];
  if (text === undefined) throw new Error(`no word ${name}`);
  return text.replace(/\{(\w+)\}/g, (_, value) => String(values[value]));
}

/** Let an element say something, in whatever language the page is switched to. */
function say(element, name, values = {}) {
  element.dataset.word = name;
  wordValues.set(element, values);
  const text = word(name, valuesOf(element));
  if (element.textContent !== text) element.textContent = text;
}

function translatePage() {
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  for (const element of document.querySelectorAll("[data-word]")) say(element, element.dataset.word, wordValues.get(element));
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", word(element.dataset.label));
  for (const element of document.querySelectorAll("[data-placeholder]")) element.placeholder = word(element.dataset.placeholder);
}

/** Values that are functions depend on the language. */
function valuesOf(element) {
  const values = wordValues.get(element);
  return Object.fromEntries(Object.entries(values).map(([name, value]) => [name, typeof value === "function" ? value() : value]));
}

function formatNumber(value, digits = 0) {
  return new Intl.NumberFormat(language, { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);
}

function formatMilliseconds(seconds) {
  const milliseconds = seconds * 1000;
  return `${formatNumber(milliseconds, milliseconds < 10 ? 1 : 0)} ms`;
}

function formatDuration(seconds) {
  if (seconds < 90) return word("seconds", { n: formatNumber(seconds) });
  if (seconds < 5400) return word("minutes", { n: formatNumber(seconds / 60) });
  return word("hours", { n: formatNumber(seconds / 3600) });
}

function formatBytes(count) {
  const units = ["B", "KB", "MB", "GB", "TB", "PB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log(Math.max(1, count)) / Math.log(1000)));
  const value = count / 1000 ** power;
  return `${formatNumber(value, power && value < 10 ? 1 : 0)} ${units[power]}`;
}

function formatShare(part, whole) {
  if (!whole) return "–";
  const percent = (100 * part) / whole;
  return `${formatNumber(percent, percent && percent < 10 ? 1 : 0)}%`;
}
