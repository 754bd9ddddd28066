"""Chinese grade-school word problems with worked steps: forty templates of our own.

Each template draws names and numbers and returns (question, step lines, answer).
Invariant: the answer is an integer, and the last step line ends with it.
"""

from collections.abc import Callable
from random import Random

from tools.train_tiny.data.example import Example
from tools.train_tiny.data.worked_steps import divide_steps, multiply_steps

Problem = tuple[str, list[str], int]

NAMES = (
    "小明",
    "小红",
    "小华",
    "小刚",
    "小丽",
    "小强",
    "小芳",
    "小军",
    "王老师",
    "李阿姨",
    "张叔叔",
    "刘奶奶",
    "陈爷爷",
    "妈妈",
    "爸爸",
)
PUPILS = NAMES[:8]
FRUIT = ("苹果", "梨", "橘子", "桃子", "西瓜", "香蕉", "草莓", "葡萄")
GOODS = ("铅笔", "本子", "橡皮", "尺子", "故事书", "钢笔", "书包", "足球", "篮球", "毛巾", "水杯")
_ENDINGS = ("", "", "请写出过程。", "请一步一步计算。", "只写数字。")


def sample(rng: Random) -> Example:
    """One word problem."""
    question, lines, answer = rng.choice(TEMPLATES)(rng)
    prompt = question + rng.choice(_ENDINGS)
    return Example(prompt=prompt, steps="\n".join(lines), answer=str(answer), category="word_problems", language="zh")


def _times(label: str, left: int, right: int, unit: str) -> list[str]:
    """`label` with a product, long-hand lines first."""
    return [*multiply_steps(left, right), f"{label}{left}*{right}={left * right}{unit}"]


def _over(label: str, dividend: int, divisor: int, unit: str) -> list[str]:
    """`label` with an exact quotient, long-hand lines first."""
    return [*divide_steps(dividend, divisor), f"{label}{dividend}/{divisor}={dividend // divisor}{unit}"]


def _buy_change(rng: Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(GOODS)
    price, count = rng.randint(2, 30), rng.randint(2, 12)
    total = price * count
    paid = total + rng.randint(1, 60)
    question = f"{name}买了{count}个{thing}，每个{price}元，付了{paid}元，应找回多少元？"
    return question, [*_times("一共花了", price, count, "元"), f"找回{paid}-{total}={paid - total}元"], paid - total


def _two_goods(rng: Random) -> Problem:
    name, (first, second) = rng.choice(NAMES), rng.sample(GOODS, 2)
    a, b, m, n = rng.randint(2, 40), rng.randint(2, 40), rng.randint(2, 15), rng.randint(2, 15)
    question = f"{name}买了{m}个{first}和{n}个{second}，{first}每个{a}元，{second}每个{b}元，一共花了多少元？"
    lines = [
        *_times(f"{first}花了", a, m, "元"),
        *_times(f"{second}花了", b, n, "元"),
        f"一共{a * m}+{b * n}={a * m + b * n}元",
    ]
    return question, lines, a * m + b * n


def _more_then_sum(rng: Random) -> Problem:
    (first, second), fruit = rng.sample(PUPILS, 2), rng.choice(FRUIT)
    a, d = rng.randint(5, 90), rng.randint(2, 40)
    question = f"{first}有{a}个{fruit}，{second}比{first}多{d}个，两人一共有多少个{fruit}？"
    return question, [f"{second}有{a}+{d}={a + d}个", f"一共{a}+{a + d}={2 * a + d}个"], 2 * a + d


def _fewer_then_sum(rng: Random) -> Problem:
    (first, second), fruit = rng.sample(PUPILS, 2), rng.choice(FRUIT)
    d = rng.randint(2, 40)
    a = d + rng.randint(1, 80)
    question = f"{first}有{a}个{fruit}，{second}比{first}少{d}个，两人一共有多少个{fruit}？"
    return question, [f"{second}有{a}-{d}={a - d}个", f"一共{a}+{a - d}={2 * a - d}个"], 2 * a - d


def _multiple_sum(rng: Random) -> Problem:
    (first, second), thing = rng.sample(PUPILS, 2), rng.choice(GOODS)
    a, k = rng.randint(3, 60), rng.randint(2, 9)
    question = f"{first}有{a}个{thing}，{second}的{thing}是{first}的{k}倍，两人共有多少个{thing}？"
    return question, [*_times(f"{second}有", a, k, "个"), f"共有{a}+{a * k}={a + a * k}个"], a + a * k


def _multiple_difference(rng: Random) -> Problem:
    a, k = rng.randint(3, 80), rng.randint(2, 9)
    question = f"果园里有梨树{a}棵，苹果树的棵数是梨树的{k}倍，苹果树比梨树多多少棵？"
    return question, [*_times("苹果树有", a, k, "棵"), f"多{a * k}-{a}={a * k - a}棵"], a * k - a


def _share(rng: Random) -> Problem:
    name, fruit = rng.choice(NAMES), rng.choice(FRUIT)
    each, people, left = rng.randint(2, 30), rng.randint(2, 20), rng.randint(1, 9)
    total = each * people + left
    question = f"{name}有{total}个{fruit}，平均分给{people}个小朋友后还剩{left}个，每个小朋友分到多少个？"
    lines = [f"分出去{total}-{left}={total - left}个", *_over("每人", total - left, people, "个")]
    return question, lines, each


def _remaining_pages(rng: Random) -> Problem:
    name = rng.choice(PUPILS)
    days, pages = rng.randint(2, 14), rng.randint(5, 30)
    total = days * pages + rng.randint(5, 150)
    question = f"一本书有{total}页，{name}每天看{pages}页，看了{days}天，还剩多少页没有看？"
    lines = [*_times("看了", pages, days, "页"), f"还剩{total}-{days * pages}={total - days * pages}页"]
    return question, lines, total - days * pages


def _finish_days(rng: Random) -> Problem:
    name = rng.choice(PUPILS)
    pages, days, read = rng.randint(5, 30), rng.randint(2, 15), rng.randint(5, 100)
    total = pages * days + read
    question = f"{name}看一本{total}页的书，已经看了{read}页，剩下的每天看{pages}页，还要看多少天？"
    return question, [f"剩下{total}-{read}={total - read}页", *_over("还要", total - read, pages, "天")], days


def _travel(rng: Random) -> Problem:
    vehicle, speed = rng.choice((("汽车", 60), ("火车", 120), ("自行车", 15), ("轮船", 30)))
    speed, hours = speed + rng.randint(-10, 20), rng.randint(2, 9)
    question = f"一辆{vehicle}每小时行{speed}千米，{hours}小时行多少千米？".replace("辆轮船", "艘轮船").replace(
        "辆火车", "列火车"
    )
    return question, _times("行了", speed, hours, "千米"), speed * hours


def _travel_left(rng: Random) -> Problem:
    speed, hours, left = rng.randint(30, 110), rng.randint(2, 8), rng.randint(10, 200)
    total = speed * hours + left
    question = (
        f"甲乙两地相距{total}千米，一辆汽车从甲地开往乙地，每小时行{speed}千米，行了{hours}小时，离乙地还有多少千米？"
    )
    return question, [*_times("行了", speed, hours, "千米"), f"还有{total}-{speed * hours}={left}千米"], left


def _meeting(rng: Random) -> Problem:
    a, b, hours = rng.randint(30, 90), rng.randint(30, 90), rng.randint(2, 9)
    total = (a + b) * hours
    question = f"两车从相距{total}千米的两地同时相向而行，甲车每小时行{a}千米，乙车每小时行{b}千米，几小时后相遇？"
    return question, [f"每小时共行{a}+{b}={a + b}千米", *_over("相遇时间", total, a + b, "小时")], hours


def _round_trip_speed(rng: Random) -> Problem:
    speed, hours, back = rng.randint(4, 40) * 2, rng.choice((2, 4, 6, 8)), rng.choice((2, 4))
    total = speed * hours
    question = f"一辆车去时每小时行{speed}千米，用了{hours}小时，原路返回用了{back}小时，返回时每小时行多少千米？"
    return question, [*_times("路程", speed, hours, "千米"), *_over("返回速度", total, back, "千米")], total // back


def _rectangle_area(rng: Random) -> Problem:
    a, b = rng.randint(3, 60), rng.randint(3, 60)
    place = rng.choice(("菜地", "教室", "操场", "花坛", "院子"))
    question = f"一块长方形{place}长{max(a, b)}米，宽{min(a, b)}米，面积是多少平方米？"
    return question, _times("面积", max(a, b), min(a, b), "平方米"), a * b


def _rectangle_perimeter(rng: Random) -> Problem:
    a, b = sorted((rng.randint(3, 99), rng.randint(3, 99)), reverse=True)
    question = f"一个长方形长{a}厘米，宽{b}厘米，周长是多少厘米？"
    return question, [f"长加宽{a}+{b}={a + b}厘米", *_times("周长", a + b, 2, "厘米")], 2 * (a + b)


def _square_side(rng: Random) -> Problem:
    side = rng.randint(3, 60)
    question = f"一个正方形的周长是{4 * side}米，它的面积是多少平方米？"
    return question, [*_over("边长", 4 * side, 4, "米"), *_times("面积", side, side, "平方米")], side * side


def _age_later(rng: Random) -> Problem:
    name, age, years, k = rng.choice(PUPILS), rng.randint(5, 14), rng.randint(2, 12), rng.randint(3, 5)
    question = f"{name}今年{age}岁，妈妈的年龄是{name}的{k}倍，{years}年后妈妈多少岁？"
    return (
        question,
        [*_times("妈妈今年", age, k, "岁"), f"{years}年后{age * k}+{years}={age * k + years}岁"],
        age * k + years,
    )


def _age_gap(rng: Random) -> Problem:
    name, age, years = rng.choice(PUPILS), rng.randint(5, 14), rng.randint(2, 10)
    father = age + rng.randint(22, 35)
    question = f"{name}今年{age}岁，爸爸今年{father}岁，{years}年后两人年龄之和是多少岁？"
    now = age + father
    lines = [
        f"今年之和{age}+{father}={now}岁",
        f"两人共增加{years}*2={years * 2}岁",
        f"{now}+{years * 2}={now + years * 2}岁",
    ]
    return question, lines, now + years * 2


def _tree_line(rng: Random) -> Problem:
    gap, count = rng.randint(2, 10), rng.randint(5, 60)
    question = f"在一条长{gap * count}米的小路一边植树，每隔{gap}米种一棵，两端都种，一共要种多少棵树？"
    return question, [*_over("间隔数", gap * count, gap, "个"), f"棵数{count}+1={count + 1}棵"], count + 1


def _packing(rng: Random) -> Problem:
    thing, each, boxes, loose = rng.choice(GOODS), rng.randint(4, 40), rng.randint(2, 30), rng.randint(1, 30)
    question = f"工厂把{thing}装箱，每箱{each}个，装了{boxes}箱，还剩{loose}个，一共有多少个{thing}？"
    return (
        question,
        [*_times("装箱", each, boxes, "个"), f"一共{each * boxes}+{loose}={each * boxes + loose}个"],
        each * boxes + loose,
    )


def _efficiency(rng: Random) -> Problem:
    per, days, extra = rng.randint(10, 90), rng.randint(2, 12), rng.randint(2, 12)
    question = f"工人{days}天做了{per * days}个零件，照这样计算，{days + extra}天能做多少个零件？"
    lines = [*_over("每天做", per * days, days, "个"), *_times("能做", per, days + extra, "个")]
    return question, lines, per * (days + extra)


def _class_total(rng: Random) -> Problem:
    classes, pupils, teachers = rng.randint(2, 12), rng.randint(25, 55), rng.randint(2, 20)
    question = f"学校组织春游，有{classes}个班，每班{pupils}人，另有老师{teachers}人，一共去了多少人？"
    total = classes * pupils
    return (
        question,
        [*_times("学生", pupils, classes, "人"), f"一共{total}+{teachers}={total + teachers}人"],
        total + teachers,
    )


def _boats(rng: Random) -> Problem:
    seats, boats = rng.randint(3, 12), rng.randint(3, 20)
    boys = rng.randint(2, seats * boats - 2)
    question = f"有{boys}名男生和{seats * boats - boys}名女生去划船，每条船坐{seats}人，需要多少条船？"
    return (
        question,
        [f"一共{boys}+{seats * boats - boys}={seats * boats}人", *_over("需要", seats * boats, seats, "条")],
        boats,
    )


def _discount(rng: Random) -> Problem:
    thing, tenth, base = rng.choice(("外套", "书包", "台灯", "球鞋", "电饭锅")), rng.randint(5, 9), rng.randint(3, 60)
    price = base * 10
    question = f"一个{thing}原价{price}元，现在打{tenth}折出售，便宜了多少元？".replace("一个外套", "一件外套").replace(
        "一个球鞋", "一双球鞋"
    )
    lines = [
        f"{price}/10={base}",
        *_times("现价", base, tenth, "元"),
        f"便宜{price}-{base * tenth}={price - base * tenth}元",
    ]
    return question, lines, price - base * tenth


def _percent(rng: Random) -> Problem:
    percent, base = rng.choice((10, 20, 25, 30, 40, 50, 60, 75, 80)), 20 * rng.randint(2, 50)
    kind, rest = rng.choice((("女生", "男生"), ("会游泳的", "不会游泳的"), ("戴眼镜的", "不戴眼镜的")))
    part = base * percent // 100
    question = f"学校有{base}人，其中{kind}占{percent}%，{rest}有多少人？"
    lines = [
        *multiply_steps(base, percent),
        f"{kind}{base}*{percent}/100={part}人",
        f"{rest}{base}-{part}={base - part}人",
    ]
    return question, lines, base - part


def _fraction(rng: Random) -> Problem:
    bottom, unit = rng.randint(2, 9), rng.randint(3, 60)
    top = rng.randint(1, bottom - 1)
    total = bottom * unit
    question = f"一根绳子长{total}米，用去了{bottom}分之{top}，还剩多少米？"
    lines = [
        *_over("每份", total, bottom, "米"),
        *_times("用去", unit, top, "米"),
        f"还剩{total}-{unit * top}={total - unit * top}米",
    ]
    return question, lines, total - unit * top


def _chickens(rng: Random) -> Problem:
    chickens, rabbits = rng.randint(2, 30), rng.randint(2, 30)
    heads, feet = chickens + rabbits, 2 * chickens + 4 * rabbits
    question = f"鸡兔同笼，共有{heads}个头，{feet}只脚，兔有多少只？"
    lines = [
        f"假设全是鸡{heads}*2={heads * 2}只脚",
        f"多出{feet}-{heads * 2}={2 * rabbits}只脚",
        f"兔{2 * rabbits}/2={rabbits}只",
    ]
    return question, lines, rabbits


def _sum_difference(rng: Random) -> Problem:
    (first, second), small, gap = rng.sample(PUPILS, 2), rng.randint(5, 90), rng.randint(2, 40)
    total = 2 * small + gap
    question = f"{first}和{second}共有{total}张邮票，{first}比{second}多{gap}张，{second}有多少张？"
    return question, [f"{total}-{gap}={total - gap}张", f"{second}{total - gap}/2={small}张"], small


def _sum_multiple(rng: Random) -> Problem:
    small, k = rng.randint(4, 60), rng.randint(2, 8)
    total = small * (k + 1)
    question = f"甲乙两个书架共有{total}本书，甲书架的书是乙书架的{k}倍，甲书架有多少本书？"
    lines = [f"份数{k}+1={k + 1}", *_over("乙书架", total, k + 1, "本"), *_times("甲书架", small, k, "本")]
    return question, lines, small * k


def _average(rng: Random) -> Problem:
    values = [rng.randint(60, 100) for _ in range(rng.choice((3, 4)))]
    values[-1] -= sum(values) % len(values)
    total, name = sum(values), rng.choice(PUPILS)
    question = f"{name}{len(values)}次测验的成绩分别是{'、'.join(map(str, values))}分，平均成绩是多少分？"
    lines, running = [], values[0]
    for value in values[1:]:
        lines.append(f"{running}+{value}={running + value}")
        running += value
    return question, [*lines, *_over("平均", total, len(values), "分")], total // len(values)


def _saving(rng: Random) -> Problem:
    name, week, weeks, has = rng.choice(PUPILS), rng.randint(3, 30), rng.randint(3, 20), rng.randint(5, 100)
    goal = week * weeks + has
    question = f"{name}想买一个{goal}元的玩具，已经存了{has}元，以后每周存{week}元，还要存多少周？"
    return question, [f"还差{goal}-{has}={goal - has}元", *_over("还要", goal - has, week, "周")], weeks


def _bus(rng: Random) -> Problem:
    start, off, on = rng.randint(20, 50), rng.randint(2, 18), rng.randint(2, 18)
    question = f"公共汽车上有{start}人，到站后下去{off}人，又上来{on}人，现在车上有多少人？"
    return question, [f"{start}-{off}={start - off}人", f"{start - off}+{on}={start - off + on}人"], start - off + on


def _bus_two_stops(rng: Random) -> Problem:
    start, off, on, off2 = rng.randint(30, 60), rng.randint(2, 12), rng.randint(2, 18), rng.randint(2, 12)
    a, b = start - off, start - off + on
    question = (
        f"一辆公交车出发时有{start}名乘客，第一站下车{off}人、上车{on}人，第二站下车{off2}人，车上还有多少名乘客？"
    )
    return (
        question,
        [f"第一站下车后{start}-{off}={a}人", f"上车后{a}+{on}={b}人", f"第二站后{b}-{off2}={b - off2}人"],
        b - off2,
    )


def _warehouse(rng: Random) -> Problem:
    stock, trips, load = rng.randint(200, 900), rng.randint(2, 9), rng.randint(5, 22)
    incoming = rng.randint(20, 300)
    moved = trips * load
    question = f"仓库里有{stock}吨粮食，运走{trips}车，每车{load}吨，又运来{incoming}吨，现在有多少吨？"
    left = stock - moved
    return (
        question,
        [
            *_times("运走", load, trips, "吨"),
            f"剩{stock}-{moved}={left}吨",
            f"现有{left}+{incoming}={left + incoming}吨",
        ],
        left + incoming,
    )


def _farm(rng: Random) -> Problem:
    ducks, k, geese = rng.randint(10, 80), rng.randint(2, 6), rng.randint(5, 60)
    total = ducks + ducks * k + geese
    question = f"农场有鸭{ducks}只，鸡是鸭的{k}倍，鹅有{geese}只，鸡鸭鹅一共多少只？"
    lines = [
        *_times("鸡有", ducks, k, "只"),
        f"鸡和鸭{ducks * k}+{ducks}={ducks * k + ducks}只",
        f"一共{ducks * k + ducks}+{geese}={total}只",
    ]
    return question, lines, total


def _tickets(rng: Random) -> Problem:
    adult, child, a, c = rng.randint(10, 60), rng.randint(5, 30), rng.randint(2, 9), rng.randint(2, 40)
    total = adult * a + child * c
    question = f"公园门票成人每张{adult}元，儿童每张{child}元，{a}名大人带{c}名儿童，买票共需多少元？"
    lines = [
        *_times("成人票", adult, a, "元"),
        *_times("儿童票", child, c, "元"),
        f"共需{adult * a}+{child * c}={total}元",
    ]
    return question, lines, total


def _water_tank(rng: Random) -> Problem:
    inflow = rng.randint(8, 40)
    outflow, minutes = rng.randint(2, inflow - 2), rng.randint(3, 20)
    net = inflow - outflow
    question = f"水池每分钟进水{inflow}升，同时每分钟放水{outflow}升，{net * minutes}升的空水池多少分钟注满？"
    return question, [f"每分钟净增{inflow}-{outflow}={net}升", *_over("需要", net * minutes, net, "分钟")], minutes


def _unit_price(rng: Random) -> Problem:
    fruit, price, first, second = rng.choice(FRUIT), rng.randint(2, 20), rng.randint(2, 9), rng.randint(2, 15)
    question = f"买{first}千克{fruit}用了{price * first}元，照这样计算，买{second}千克{fruit}需要多少元？"
    return (
        question,
        [*_over("每千克", price * first, first, "元"), *_times("需要", price, second, "元")],
        price * second,
    )


def _queue(rng: Random) -> Problem:
    name, front, back = rng.choice(PUPILS), rng.randint(2, 30), rng.randint(2, 30)
    question = f"同学们排队，{name}前面有{front}人，后面有{back}人，这一队一共有多少人？"
    return (
        question,
        [f"{front}+{back}={front + back}人", f"加上{name}{front + back}+1={front + back + 1}人"],
        front + back + 1,
    )


def _give_equal(rng: Random) -> Problem:
    (first, second), small, gift = rng.sample(PUPILS, 2), rng.randint(5, 60), rng.randint(2, 20)
    big = small + 2 * gift
    question = f"{first}有{big}颗糖，{second}有{small}颗糖，{first}给{second}多少颗后两人一样多？"
    return question, [f"相差{big}-{small}={2 * gift}颗", f"给{2 * gift}/2={gift}颗"], gift


TEMPLATES: tuple[Callable[[Random], Problem], ...] = (
    _buy_change, _two_goods, _more_then_sum, _fewer_then_sum, _multiple_sum, _multiple_difference, _share,
    _remaining_pages, _finish_days, _travel, _travel_left, _meeting, _round_trip_speed, _rectangle_area,
    _rectangle_perimeter, _square_side, _age_later, _age_gap, _tree_line, _packing, _efficiency, _class_total, _boats,
    _discount, _percent, _fraction, _chickens, _sum_difference, _sum_multiple, _average, _saving, _bus, _bus_two_stops,
    _warehouse, _farm, _tickets, _water_tank, _unit_price, _queue, _give_equal,
)  # fmt: skip
