
// The start: which view is shown, and what the buttons above do.

const VIEWS = ["playground", "deployment"];

function showView() {
  const wanted = VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : VIEWS[0];
  for (const view of VIEWS) {
    find(`${view}-view`).hidden = view !== wanted;
    if (view === wanted) find(`to-${view}`).setAttribute("aria-current", "page");
    else find(`to-${view}`).removeAttribute("aria-current");
  }
  window.scrollTo(0, 0);
  poll();
}

function start() {
  showLanguage();
  showTheme();
  startPlayground();
  startDeployment();
  redraw();
  darkPreference.addEventListener("change", showTheme);
  find("theme").addEventListener("click", toggleTheme);
  find("language").addEventListener("click", toggleLanguage);
  find("key-button").addEventListener("click", () => showKeyBar(find("key-bar").hidden, true));
  find("key-bar").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey(find("key-field").value);
    poll();
  });
  find("skip").addEventListener("click", (event) => {
    event.preventDefault();
    find("content").focus();
  });
  window.addEventListener("hashchange", showView);
  showView();
  if (!find("playground-view").hidden && !matchMedia("(pointer: coarse)").matches) find("message").focus();
}

start();
