showRuns();
showAccount();
showPlans();
showEvaluations();
showCurves();
showTime();
showDistributions();
showPictures();
showRollouts().then(() => {
  for (const part of document.querySelectorAll("main > section"))
    document.querySelector("nav").append(el("a", { href: `#${part.id}` }, part.querySelector("h2").textContent));
  document.body.dataset.ready = "true";
});
