// Which plan a request is for, and the models of all plans in one list.
const PLANS = ["dense", "window"];
const MODELS = "/v1/models/";

function model(r) {
    if (r.uri.startsWith(MODELS)) return r.uri.slice(MODELS.length);
    try {
        return String(JSON.parse(r.requestText).model || "");
    } catch (error) {
        return "";
    }
}

function route(r) {
    r.variables.model = model(r);
    r.internalRedirect("@plan");
}

async function list(r) {
    const answers = await Promise.all(PLANS.map(plan => r.subrequest(`/plans/${plan}`)));
    const good = answers.filter(answer => answer.status === 200);
    r.headersOut["Content-Type"] = "application/json";
    if (good.length === 0) {
        const refused = answers.find(answer => answer.status < 500) || answers[0];
        r.return(refused.status, refused.responseText);
        return;
    }
    const data = [];
    good.forEach(answer => data.push.apply(data, JSON.parse(answer.responseText).data));
    r.return(200, JSON.stringify({ object: "list", data }));
}

export default { route, list };
