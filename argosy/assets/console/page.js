
// What both views share: elements, theme, language, the key, and the way to the server.

const KEY_ITEM = "argosy.key"; // in sessionStorage alone
const THEME_ITEM = "argosy.theme";
const LANGUAGE_ITEM = "argosy.language";

const find = (id) => document.getElementById(id);

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

function makeSaying(tag, className, name, values = {}) {
  const element = make(tag, className);
  say(element, name, values);
  return element;
}

/** For screen readers. */
function announce(text) {
  find("announcer").textContent = text;
}

/** Storage that a browser may forbid. */
function remembered(storage, item) {
  try {
    return storage.getItem(item);
  } catch {
    return null;
  }
}

function remember(storage, item, value) {
  try {
    if (value) storage.setItem(item, value);
    else storage.removeItem(item);
  } catch {
    // Then it holds until the page is left.
  }
}

// --- theme and language ----------------------------------------------------------------------------------------------

const darkPreference = window.matchMedia("(prefers-color-scheme: dark)");
const drawers = new Set(); // called when colours or words have changed

function redraw() {
  for (const draw of drawers) draw();
}

function showTheme() {
  const theme = remembered(localStorage, THEME_ITEM) ?? (darkPreference.matches ? "dark" : "light");
  document.documentElement.dataset.theme = theme;
  showThemeButton();
  redraw();
}

function showThemeButton() {
  const isDark = document.documentElement.dataset.theme === "dark";
  const name = word(isDark ? "toLight" : "toDark");
  find("theme").textContent = name;
  find("theme").setAttribute("aria-label", word("themeLabel", { theme: name }));
}

function toggleTheme() {
  remember(localStorage, THEME_ITEM, document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  showTheme();
}

function showLanguage() {
  const wanted = remembered(localStorage, LANGUAGE_ITEM) ?? navigator.language;
  language = wanted.toLowerCase().startsWith("zh") ? "zh" : "en";
  translatePage();
  const other = find("language");
  other.textContent = language === "en" ? "中文" : "English";
  other.lang = language === "en" ? "zh-Hans" : "en";
  showThemeButton();
  redraw();
}

function toggleLanguage() {
  remember(localStorage, LANGUAGE_ITEM, language === "en" ? "zh" : "en");
  showLanguage();
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// --- the server ------------------------------------------------------------------------------------------------------

let apiKey = remembered(sessionStorage, KEY_ITEM) ?? "";

class ServerError extends Error {
  /** error: the API's error object; requestId: for the server's log. */
  constructor(status, error, requestId) {
    super(error.message);
    this.status = status;
    this.param = error.param ?? null;
    this.requestId = requestId;
  }
}

/** Ask the server; an answer that is an error is thrown with the server's own words. */
async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  if (apiKey) headers.set("Authorization", `Bearer ${apiKey}`);
  const answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  if (answer.ok) return answer;
  const requestId = answer.headers.get("X-Request-Id");
  let error = { message: `${answer.status} ${answer.statusText}` };
  try {
    error = (await answer.json()).error ?? error;
  } catch {
    // Not ours: a proxy's page.
  }
  if (answer.status === 401) showKeyBar(true);
  throw new ServerError(answer.status, error, requestId);
}

function showKeyBar(isVisible, isFocused = false) {
  find("key-bar").hidden = !isVisible;
  find("key-button").setAttribute("aria-expanded", String(isVisible));
  if (isVisible) find("key-field").value = apiKey;
  if (isVisible && isFocused) find("key-field").focus();
}

function useKey(key) {
  apiKey = key.trim();
  remember(sessionStorage, KEY_ITEM, apiKey);
  showKeyBar(false);
}

/** state: ready, starting, restarting, failed; text: what is said instead of its word. */
function showStatus(state, name, text = "") {
  find("status").dataset.state = state;
  const place = find("status-text");
  if (text) {
    delete place.dataset.word;
    if (place.textContent !== text) place.textContent = text;
  } else {
    say(place, name);
  }
}
